"""Hostile and damaged PyTorch files: each in a child that may open nothing else, import nothing and run nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.errors import ConverterError
from converters.readers import open_checkpoint
from converters.readers.torch.legacy import MAGIC, PROTOCOL

WORDS = struct.pack("<64f", *range(64))  # the storage of most cases
BOTH = {"w": WORDS, "v": WORDS}


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x0b" + value.to_bytes(11, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def tensor(
    shape: bytes = numbers(64), strides: bytes = numbers(1), offset: int = 0, numel: int = 64, key: str = "0"
) -> bytes:
    """The pickle of a float32 tensor over storage `key`."""
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape + strides + b"\x89}tR"


def pickled(weight: bytes | None = None, **beside: bytes) -> bytes:
    """A checkpoint's pickle: a state dict with `w` and `v`, and what lies beside it."""
    state_dict = b"}" + text("w") + (tensor() if weight is None else weight) + b"s" + text("v") + tensor() + b"s"
    entries = {"state_dict": state_dict, **beside}
    return b"\x80\x02}(" + b"".join(text(name) + value for name, value in entries.items()) + b"u."


def members(pickle: bytes | None = None, **changes: bytes) -> dict[str, bytes]:
    usual = {
        "m/data.pkl": pickled() if pickle is None else pickle,
        "m/byteorder": b"little",
        "m/data/0": WORDS,
        "m/version": b"3",
    }
    return {**usual, **changes}


def archive(
    files: dict[str, bytes], *more: tuple[str | zipfile.ZipInfo, bytes], method: int = zipfile.ZIP_STORED
) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as target:
        warnings.simplefilter("ignore")  # of duplicates
        for name, data in [*files.items(), *more]:
            target.writestr(name, data)
    return stream.getvalue()


def legacy(pickle_: bytes, numel: int = 64, data: bytes = WORDS) -> bytes:
    first = [MAGIC, PROTOCOL, {"little_endian": True}]
    parts = [pickle.dumps(part, 2) for part in first] + [pickle_, pickle.dumps(["0"], 2)]
    return b"".join(parts) + struct.pack("<q", numel) + data


def patched(where: bytes, offset: int, new: bytes, which: int = 0, data: bytes | None = None) -> bytes:
    """A good archive with bytes changed at an offset from the `which`-th occurrence of `where`."""
    damaged = bytearray(archive(members()) if data is None else data)
    at = [found.start() for found in re.finditer(re.escape(where), bytes(damaged))][which] + offset
    damaged[at : at + len(new)] = new
    return bytes(damaged)


LOCAL, CENTRAL, END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


def zip64(offset: int) -> bytes:
    """A good archive whose directory is said to lie at `offset` by a zip64 record."""
    good = archive(members())
    at = good.rindex(END)
    count, size = struct.unpack("<2xHI", good[at + 8 : at + 16])
    record = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<4sIQI", b"PK\x06\x07", 0, at, 1)
    return good[:at] + record + locator + END + b"\0" * 4 + b"\xff" * 12 + b"\0\0"


def bomb(name: str) -> Callable[[], bytes]:
    """An archive with 300 MB of zeros deflated under `name`."""

    def make() -> bytes:
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target:
            for other, data in members().items():
                if other != name:
                    target.writestr(other, data, zipfile.ZIP_STORED)
            with target.open(name, "w") as file:
                for _ in range(300):
                    file.write(bytes(1 << 20))
        return stream.getvalue()

    return make


def understated() -> bytes:
    """A deflated data.pkl that both headers say is small."""
    good = archive({"m/data.pkl": pickled() + bytes(50_000_000)}, method=zipfile.ZIP_DEFLATED)
    size = struct.pack("<I", len(pickled()) + 50_000_000)
    return good.replace(size, struct.pack("<I", len(pickled())))


def symlink() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("m/link")
    info.external_attr = 0o120777 << 16
    return info


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def saved(value: Any, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream, **options)
        return stream.getvalue()

    return make


SYSTEM = b"cposix\nsystem\n(" + text("true") + b"tR"
GETATTR = b"cbuiltins\ngetattr\n(cnumpy\nndarray\n" + text("mean") + b"tR"
DOUBLING = b"]" + b"q\x010]h\x01ah\x01a" * 100
NESTED = b"]" * 100_000 + b"a" * 99_999
DEEP_MODULES = b"}" + b"".join(  # each module holds the one below twice: 2**60 tensors
    b"q\x010cm\nN\n)\x81}(" + text("_parameters") + b"}" + text("_buffers") + b"}" + text("_modules")
    + b"}(" + text("a") + b"h\x01" + text("b") + b"h\x01uub"
    for _ in range(60)
)  # fmt: skip
OPENS = "opens"
HUGE = 1 << 62

CASES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "sound": (archive(members()), OPENS),
    "sound legacy": (legacy(pickled()), OPENS),
    # 1 to 5: code
    "1 os.system, zip": (saved({"w": Payload()}), "its pickle names posix.system, which runs code"),
    "1 os.system, legacy": (
        saved({"w": Payload()}, _use_new_zipfile_serialization=False),
        "its pickle names posix.sys",
    ),
    "1 os.system, bare": (lambda: pickle.dumps(Payload()), "its pickle names posix.system, which runs code"),
    "1 beside the weights": (archive(members(pickled(extra=SYSTEM))), "its pickle names posix.system"),
    "2 getattr in metadata": (archive(members(pickled(log=GETATTR))), OPENS),
    "2 getattr for a tensor": (archive(members(pickled(GETATTR))), "w: is no tensor but a builtins.getattr"),
    "2 attrgetter": (archive(members(pickled(b"coperator\nattrgetter\n)R"))), "w: is no tensor but a operator.attrget"),
    "2 partial": (archive(members(pickled(b"cfunctools\npartial\n)R"))), "w: is no tensor but a functools.partial"),
    "2 torch.load": (
        archive(members(pickled(b"ctorch\nload\n(" + text("x") + b"tR"))),
        "w: is no tensor but a torch.l",
    ),
    "3 dotted": (
        archive(members(b"\x80\x04" + text("torch") + text("_utils.os.system") + b"\x93.")),
        "its pickle names",
    ),
    "4 then a broken end": (legacy(SYSTEM + b"\xff\xff\xff"), "its pickle names posix.system"),
    "5 INST": (archive(members(b"(S'true'\niposix\nsystem\n.")), "its pickle names posix.system"),
    "5 persistent id": (archive(members(pickled(b"(" + text("storage") + text("x") + b"tQ"))), "its pickle breaks off"),
    "5 persistent id of text": (archive(members(pickled(b"Pstorage\n"))), "its pickle breaks off"),
    "5 extension": (archive(members(pickled(b"\x82\x01)R"))), "w: is no tensor but a copyreg.extension 1"),
    "5 tensor type is an object": (
        archive(members(pickled(b"ctorch._tensor\n_rebuild_from_type_v2\n(NN)}tR"))),
        "its pickle breaks off",
    ),
    "5 dtype with escape codes": (
        archive(members(pickled(tensor().replace(b"_v2", b"_v3").replace(b"\x89}t", b"\x89}ctorch\n\x1b[31m\nt")))),
        r"w: is of dtype \x1b[31m, which is not converted",
    ),
    # 6 to 8: tensors
    "6 item of a tensor": (archive(members(pickled(tensor() + b"NNs"))), "its pickle breaks off or makes no sense"),
    "6 state of a tensor": (archive(members(pickled(tensor() + b"}b"))), "its pickle breaks off or makes no sense"),
    "7 fewer elements": (
        archive(members(pickled(tensor(numel=16)))),
        "w: its storage takes 64 bytes, but the file has 256",
    ),
    "7 more elements": (
        archive(members(pickled(tensor(numel=4096)))),
        "w: its storage takes 16384 bytes, but the file has",
    ),
    "7 record missing": (archive(members(pickled(tensor(key="1")))), "w: has no m/data/1"),
    "7 record elsewhere": (archive(members(pickled(tensor(key="../data.pkl")))), "w: has no m/data/../data.pkl"),
    "7 negative elements": (archive(members(pickled(tensor(numel=-1)))), "its pickle breaks off"),
    "7 legacy": (legacy(pickled(), 16), "its storages are not those that its pickle names"),
    "8 beyond the end": (archive(members(pickled(tensor(numbers(65))))), "w: reaches beyond its storage"),
    "8 offset": (archive(members(pickled(tensor(offset=1)))), "w: reaches beyond its storage"),
    "8 offset, huge": (archive(members(pickled(tensor(offset=HUGE)))), "w: reaches beyond its storage"),
    "8 negative offset": (archive(members(pickled(tensor(offset=-1)))), "w: its offset, shape or strides"),
    "8 negative stride": (archive(members(pickled(tensor(strides=numbers(-1))))), "w: its offset, shape or strides"),
    "8 negative size": (archive(members(pickled(tensor(numbers(-64))))), "w: its offset, shape or strides"),
    "8 huge size": (archive(members(pickled(tensor(numbers(1 << 80))))), "w: its offset, shape or strides"),
    "8 huge stride": (archive(members(pickled(tensor(numbers(2), numbers(HUGE))))), "w: reaches beyond its storage"),
    "8 more strides": (archive(members(pickled(tensor(strides=numbers(1, 1))))), "w: its offset, shape or strides"),
    "8 shape of text": (archive(members(pickled(tensor(text("64"))))), "w: its offset, shape or strides"),
    "8 stride 0": (
        archive(members(pickled(tensor(numbers(10**6, 10**6), numbers(0, 0))))),
        "w: is an expanded view: 256 bytes would become 4000000000000",
    ),
    "8 overlap": (
        archive(members(pickled(tensor(numbers(2, 2, 2, 2, 10**6), numbers(1, 1, 1, 1, 0))))),
        "w: is an expanded view",
    ),
    # 9: bombs
    "9 doubling lists": (archive(members(pickled(log=DOUBLING))), OPENS),
    "9 nested lists": (archive(members(pickled(log=NESTED))), "its pickle is nested too deeply"),
    "9 doubling modules": (archive(members(pickled(log=DEEP_MODULES))), "its modules are nested too deeply"),
    "9 doubling tuples as a key": (archive(members(pickled(log=b"}N" + b"2\x86" * 200 + b"Ns"))), OPENS),
    "9 text of 2**63 bytes": (archive(members(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 63))), "its pickle breaks off"),
    "9 text of 2**62 bytes": (legacy(b"\x80\x04\x8d" + struct.pack("<Q", HUGE)), "its pickle breaks off"),
    "9 holds itself": (archive(members(pickled(log=b"}q\x01" + text("a") + b"h\x01s"))), OPENS),
    # 10 to 16: the zip
    "10 a second pickle": (archive(members(), ("m/x.txt", SYSTEM + b".")), OPENS),
    "10 another data.pkl": (archive(members(), ("n/data.pkl", SYSTEM + b".")), "holds 2 data.pkl"),
    "10 after the pickle": (archive(members(pickled() + SYSTEM + b".")), "bytes follow the pickle in its data.pkl"),
    "11 duplicate": (archive(members(), ("m/data/0", bytes(256))), "two of its zip members have one name"),
    "12 flags differ": (patched(LOCAL, 6, b"\x08", 2), "w: the two headers of zip member m/data/0 differ"),
    "12 methods differ": (patched(LOCAL, 8, b"\x08", 2), "w: the two headers of zip member m/data/0 differ"),
    "12 names differ": (patched(LOCAL, 30, b"n", 2), "w: the two headers of zip member m/data/0 differ"),
    "12 sizes differ": (patched(LOCAL, 18, b"\x01", 2), "w: the two headers of zip member m/data/0 differ"),
    "12 CRCs differ": (patched(LOCAL, 14, b"\0\0\0\0", 2), "w: the two headers of zip member m/data/0 differ"),
    "12 extra length": (patched(LOCAL, 28, b"\xff\xff", 2), "w: the two headers of zip member m/data/0 differ"),
    "12 encrypted": (
        patched(CENTRAL, 8, b"\x01", 2, patched(LOCAL, 6, b"\x01", 2)),
        "w: the two headers of zip member m/data/0 differ or make no sense",
    ),
    "12 other method": (
        patched(CENTRAL, 10, b"\x0c", 2, patched(LOCAL, 8, b"\x0c", 2)),
        "w: the two headers of zip member m/data/0 differ or make no sense",
    ),
    "12 one header for two": (
        patched(CENTRAL, 42, struct.pack("<I", 0), 2),
        "w: the two headers of zip member m/data/0 differ",
    ),
    "13 junk before": (b"JUNK" + archive(members()), "is not a checkpoint of any known format"),
    "13 a zip before": (archive({"a": b"b"}) + archive(members()), "its zip members do not begin where the file does"),
    "13 junk after": (archive(members()) + b"JUNK", "does not end with a zip directory; is the download complete"),
    "13 comment": (patched(END, 20, b"\x01\0") + b"x", "does not end with a zip directory"),
    "14 bomb, pickle": (bomb("m/data.pkl"), "its m/data.pkl takes more than 268,435,456 bytes"),
    "14 bomb, tensor": (bomb("m/data/0"), "w: is compressed in the file; load and save it again"),
    "14 bomb, understated": (understated, "the size or CRC-32 of its m/data.pkl differs"),
    "14 bomb, unused": (bomb("m/unused"), OPENS),
    "15 parent folder": (archive(members(), ("m/../../x", b"")), "a zip member would leave its folder: m/../../x"),
    "15 absolute": (archive(members(), ("/etc/x", b"")), "a zip member would leave its folder: /etc/x"),
    "15 drive": (archive(members(), ("C:/x", b"")), "a zip member would leave its folder: C:/x"),
    "15 backslash": (archive(members(), ("..\\x", b"")), r"a zip member would leave its folder: ..\x"),
    "15 symlink": (archive(members(), (symlink(), b"/etc/passwd")), OPENS),
    "15 escape codes": (archive(members(), ("../\x1b[31m\n", b"")), r"would leave its folder: ../\x1b[31m\n"),
    "16 directory beyond the end": (patched(END, 16, b"\xff\xff\xff\x7f"), "its zip members do not begin"),
    "16 directory larger": (patched(END, 12, b"\xff\xff\xff\x7f"), "its zip directory is malformed"),
    "16 more members": (patched(END, 10, b"\xff\xff"), OPENS),  # a count that nobody needs
    "16 zip64 beyond the end": (lambda: zip64(HUGE), "its zip members do not begin"),
    "16 member beyond the end": (patched(CENTRAL, 42, b"\xff\xff\xff\x7f", 2), "lie outside its"),
    "20 big-endian": (archive({**members(), "m/byteorder": b"big"}), "its byte order is b'big'"),
    "20 other order": (archive({**members(), "m/byteorder": b"\x1b[31m"}), r"its byte order is b'\x1b[31m'"),
    "20 legacy": (legacy(pickled()).replace(b"\x88", b"\x89", 1), "its byte order is big-endian"),
}


def watch(*files: Path) -> dict[str, Any]:
    here = Path(__file__).parent
    command = [sys.executable, here / "watched.py", here.parents[1], *files]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (child.returncode, child.stderr) == (0, "")
    return json.loads(child.stdout)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every case, all in one child; their extension is a lie."""
    folder = tmp_path_factory.mktemp("attacks")
    files = [folder / f"{index}.safetensors" for index in range(len(CASES))]
    for file, (data, _) in zip(files, CASES.values(), strict=True):
        file.write_bytes(data if isinstance(data, bytes) else data())
    return dict(zip(CASES, watch(*files).values(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_attacks(name: str, outcomes: dict[str, Any]) -> None:
    outcome, words = outcomes[name], CASES[name][1]
    assert outcome["broken"] == []
    if words == OPENS:
        assert outcome["tensors"] == {"w": WORDS.hex(), "v": WORDS.hex()}
    else:
        assert ".safetensors: " in outcome["refusal"]
        assert words in outcome["refusal"]
        assert outcome["refusal"].isprintable()


def test_the_watch_can_fail() -> None:
    broken = watch()["watched"]["broken"]
    assert {"os.system", "import", "open"} <= {line.split()[0] for line in broken}


def test_the_sound_files_are_what_torch_reads() -> None:
    loaded = torch.load(io.BytesIO(archive(members())), weights_only=True)
    assert loaded["state_dict"]["w"].tolist() == list(range(64))


def reads(path: Path) -> dict[str, bytes] | None:
    """The tensors of a damaged file, or None where it is refused; anything else that escapes fails the test."""
    try:
        return {name: bytes(tensor.read()) for name, tensor in open_checkpoint(path).tensors.items()}
    except ConverterError as error:
        assert "\n" not in str(error)
        return None


FORMATS = {"zip": archive(members()), "legacy": legacy(pickled())}


@pytest.mark.parametrize("data", FORMATS.values(), ids=FORMATS)
def test_a_file_cut_anywhere_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    assert reads(path) == BOTH
    for end in reversed(range(len(data))):
        os.truncate(path, end)
        assert reads(path) is None, end


@pytest.mark.parametrize("data", FORMATS.values(), ids=FORMATS)
def test_any_flipped_bit_is_found_or_harmless(data: bytes, tmp_path: Path) -> None:
    """A zip's CRCs find whatever matters; a legacy file may only not crash."""
    path = tmp_path / "model.pth"
    path.write_bytes(data)
    with path.open("r+b", buffering=0) as file:
        for bit in range(8 * len(data)):
            os.pwrite(file.fileno(), bytes([data[bit // 8] ^ 1 << bit % 8]), bit // 8)
            found = reads(path)
            assert found in (None, BOTH) or data is not FORMATS["zip"], bit
            os.pwrite(file.fileno(), data[bit // 8 : bit // 8 + 1], bit // 8)
