"""What snappy itself compressed comes back, and what it never writes is refused."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time

import pytest

from converters.readers.protobuf import Malformed, Message, varint
from converters.readers.tensorflow.snappy import uncompress

COMPRESS = """
import json, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
for line in sys.stdin:
    element = tf.raw_ops.CompressElement(components=[tf.constant(bytes.fromhex(json.loads(line)))])
    print(json.dumps(tf.io.serialize_tensor(element).numpy().hex()))
"""


def texts() -> dict[str, bytes]:
    rng = random.Random(0)
    noise, words = rng.randbytes(100_000), [rng.randbytes(rng.randrange(1, 40)) for _ in range(50)]
    return {
        "nothing much": b"a",
        "one byte": b"a" * 70_000,
        "two bytes": b"ab" * 50,
        "noise": noise,
        "far copies": noise + noise,
        "words": b"".join(rng.choices(words, k=5000)),
        "60 bytes": noise[:60],
        "61 bytes": noise[:61],
        "256 bytes": noise[:256],
    }


@pytest.fixture(scope="module")
def compressed() -> dict[str, bytes]:
    lines = "\n".join(json.dumps(text.hex()) for text in texts().values())
    done = subprocess.run(
        [sys.executable, "-c", COMPRESS], input=lines, capture_output=True, text=True, check=True, timeout=120
    )
    tensors = [bytes.fromhex(json.loads(line)) for line in done.stdout.splitlines()]
    return dict(zip(texts(), map(block_of, tensors), strict=True))


def block_of(tensor: bytes) -> bytes:
    """The compressed bytes in a serialized tensor of one CompressedElement."""
    content = Message(tensor).view(4)
    _, at = varint(content, 0)
    return bytes(Message(Message(content[at:]).view(2)).view(1))


@pytest.mark.parametrize("name", texts())
def test_what_snappy_compressed_is_read(name: str, compressed: dict[str, bytes]) -> None:
    assert bytes(uncompress(compressed[name])) == texts()[name]


def test_a_cut_or_a_flip_raises_nothing_else(compressed: dict[str, bytes]) -> None:
    block = compressed["words"][:400]
    for at in range(len(block)):
        for damaged in (block[:at], block[:at] + bytes([block[at] ^ 1 << at % 8]) + block[at + 1 :]):
            with pytest.raises(Malformed):
                uncompress(damaged)


@pytest.mark.parametrize(
    ("block", "words"),
    [
        (b"", "no number ends"),
        (b"\x05\x10ab", "a block of 4 bytes ends at byte 7"),
        (b"\x05\x04ab", "uncompresses to 2 bytes, not 5"),
        (b"\x01\x04ab", "uncompresses to 2 bytes, not 1"),
        (b"\x04\x01\x00", "goes back 0 bytes from byte 0"),
        (b"\x05\x00a\x01\x02", "goes back 2 bytes from byte 1"),
        (b"\x05\x00a\x01\x00", "goes back 0 bytes from byte 1"),
        (b"\x05\x00a\x02\x01", "a block of 5 bytes ends at byte 6"),
        (b"\x05\xfc\xff\xff\xff\xff", "a block of 6 bytes ends at byte"),
        (b"\xff\xff\xff\xff\x0f\x00a", "7 bytes do not uncompress to 4294967295"),
    ],
)
def test_what_snappy_never_writes_is_refused(block: bytes, words: str) -> None:
    with pytest.raises(Malformed, match=words):
        uncompress(block)


def test_the_smallest_steps_are_quick() -> None:
    steps = 1 << 18
    block = b"\x81\x80\x40" + b"\x00a" + b"\x01\x01" * steps
    start = time.process_time()
    assert bytes(uncompress(block)) == b"a" * (4 * steps + 1)
    assert time.process_time() - start < 3
