"""Hostile and damaged Keras files: each in a child that may open nothing else, import nothing and run nothing."""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from converters.readers.keras import checkpoint as keras

WEIGHTS = np.arange(64, dtype="f4")
UNDEFINED = b"\xff" * 8
Build = Callable[[h5py.File], Any]


def hdf5(build: Build | None = None, **options: Any) -> bytes:
    """A sound .weights.h5 of one layer, and what `build` adds to its `vars`."""
    stream = io.BytesIO()
    with h5py.File(stream, "w", **options) as file:
        group = file.create_group("layers/dense/vars")
        group.attrs["name"] = "dense"
        group["0"] = WEIGHTS
        if build:
            build(group)
    return stream.getvalue()


def legacy(change: Callable[[h5py.File], Any]) -> bytes:
    """An older .h5 of one layer, changed."""
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file.attrs["layer_names"] = np.array([b"dense"])
        file["dense/dense/kernel:0"] = WEIGHTS
        file["dense"].attrs["weight_names"] = np.array([b"dense/kernel:0"])
        change(file)
    return stream.getvalue()


def archive(config: Any = None, weights: bytes | None = None, method: int = zipfile.ZIP_STORED, **more: bytes) -> bytes:
    """A .keras of one layer; `more` are members that stand in it as well, or instead of the usual ones."""
    entry = {"class_name": "Dense", "config": {"name": "dense"}}
    members = [
        ("metadata.json", b'{"keras_version": "3.15.1"}'),
        ("config.json", json.dumps(config or {"config": {"layers": [entry]}}).encode()),
        ("model.weights.h5", hdf5() if weights is None else weights),
    ]
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as target, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two members of one name are meant
        for name, data in [*members, *more.items()]:
            target.writestr(name.replace("__", "."), data)
    return stream.getvalue()


def patched(data: bytes, where: bytes, new: bytes, offset: int = 0, which: int = 0) -> bytes:
    """Bytes changed at an offset from the `which`-th occurrence of `where`."""
    at = [found.start() for found in re.finditer(re.escape(where), data)][which] + offset
    return data[:at] + new + data[at + len(new) :]


def virtual(group: h5py.Group) -> None:
    layout = h5py.VirtualLayout((16,), "f4")
    layout[:] = h5py.VirtualSource("secret.h5", "s", (16,))
    group.create_virtual_dataset("1", layout)


def external(group: h5py.Group) -> None:
    group.create_dataset("1", (16,), "f4", external=[("secret.bin", 0, 64)])


def link(target: Any, name: str = "1") -> Build:
    return lambda group: group.__setitem__(name, target)


def bomb(shape: tuple[int, ...], chunks: tuple[int, ...], fill: bool = False, **options: Any) -> Build:
    def build(group: h5py.Group) -> None:
        options.setdefault("compression", "gzip")
        dataset = group.create_dataset("1", shape, "f4", chunks=chunks, **options)
        if fill:
            dataset[...] = 0

    return build


def inflating(group: h5py.Group) -> None:
    """A chunk of 64 KiB that inflates to 100 MB."""
    dataset = group.create_dataset("1", (1 << 14,), "f4", chunks=(1 << 14,), compression="gzip")
    dataset.id.write_direct_chunk((0,), zlib.compress(bytes(100 << 20)))


def repeated(build: Build, times: int) -> Build:
    """What `build` makes, `times` times."""
    return lambda group: [build(group.create_group(f"g{i}/vars")) for i in range(times)]


def shared_text() -> bytes:
    """An attribute of 3,001 strings that are all kept in the first one's place, of 60,000 characters."""
    data = legacy(lambda file: file.attrs.__setitem__("layer_names", ["x" * 60_000, *("y" * 9 for _ in range(3000))]))
    at = data.index(struct.pack("<I", 60_000))
    return data[:at] + data[at : at + 16] * 3001 + data[at + 16 * 3001 :]


def shared_bytes() -> bytes:
    """Datasets that nobody wrote, made to lie at the beginning of the file, one upon another."""
    data = hdf5(lambda group: [group.create_dataset(str(i), (1024,), "f4") for i in range(1, 9)])
    layout = b"\x03\x01%b" + struct.pack("<Q", 4096)
    return data.replace(layout % UNDEFINED, layout % bytes(8))


def endless_header() -> bytes:
    """An object header whose continuation is the message that leads to it."""
    data = hdf5(lambda group: [group.attrs.__setitem__(str(i), "x" * 50) for i in range(20)])
    message = b"\x10\x00\x10\x00" + bytes(4)
    return patched(data, message, struct.pack("<Q", data.index(message)), 8)


def nested_json(depth: int) -> bytes:
    return b'{"config":' + b"[" * depth + b"]" * depth + b"}"


GADGET = {
    "class_name": "Functional",
    "config": {
        "layers": [
            {"class_name": "Lambda", "config": {"name": "evil", "function": ["4wEAAAAA", None, None]}},
            {"class_name": "TFSMLayer", "config": {"name": "graph", "filepath": "/etc"}},
            {"module": "os", "class_name": "system", "config": {"name": "dense", "command": "true"}},
            {"class_name": "Dense", "config": {"name": "dense"}},
        ]
    },
}
OPENS = "opens"
TREE, SNOD, HEAP, GCOL = b"TREE\x00", b"SNOD", b"HEAP", b"GCOL"
LOCAL, CENTRAL = b"PK\x03\x04", b"PK\x01\x02"

HEADERS = "the two headers of zip member model.weights.h5 differ or make no sense"
CASES: dict[str, tuple[bytes | Callable[[], bytes], str]] = {
    "sound": (hdf5, OPENS),
    "sound archive": (archive, OPENS),
    "sound legacy": (lambda: legacy(lambda _: None), OPENS),
    # 29 to 31: other files
    "29 external storage": (lambda: hdf5(external), "layers/dense/vars/1: keeps its values in another file"),
    "30 external link": (lambda: hdf5(link(h5py.ExternalLink("secret.h5", "/s"))), "vars/1: is a link that leads"),
    "30 external link, group": (
        lambda: hdf5(lambda group: group.file.__setitem__("layers/x", h5py.ExternalLink("secret.h5", "/"))),
        "layers/x: is a link that leads elsewhere",
    ),
    "30 soft link": (lambda: hdf5(link(h5py.SoftLink("/layers/dense/vars/0"))), "vars/1: is a link that leads"),
    "30 soft link, newer form": (lambda: hdf5(link(h5py.SoftLink("/x")), libver="latest"), "vars/1: is a link that"),
    "30 external link, newer form": (
        lambda: hdf5(link(h5py.ExternalLink("secret.h5", "/s")), libver="latest"),
        "vars/1: is a link that leads elsewhere",
    ),
    "31 virtual": (lambda: hdf5(virtual), "layers/dense/vars/1: takes its values from other files"),
    # 32: bombs
    "32 4 TiB, nothing stored": (lambda: hdf5(bomb((1 << 40,), (1 << 20,))), "vars/1: declares 4398046511104 bytes"),
    "32 1,000 of them": (lambda: hdf5(repeated(bomb((1 << 30,), (1 << 20,)), 1000)), "declares 4294967296 bytes"),
    "32 contiguous, nothing stored": (
        lambda: hdf5(lambda group: group.create_dataset("1", (1 << 30,), "f4")),
        "vars/1: takes 4294967296 bytes; 4294967296 are said to be stored at 18446744073709551615",
    ),
    "32 a chunk larger than its dataset": (
        lambda: hdf5(bomb((4,), (1 << 28,), fill=True, maxshape=(None,))),
        "vars/1: declares 16 bytes in chunks of 1073741824",
    ),
    "32 a chunk inflates to more": (lambda: hdf5(inflating), "dense/bias: a chunk of 65536 bytes inflates to more"),
    "32 a million chunks": (lambda: hdf5(bomb((1 << 20,), (1,))), "vars/1: declares 4194304 bytes in chunks of 4"),
    "32 one chunk of many": (
        lambda: hdf5(lambda group: group.create_dataset("1", (16,), "f4", chunks=(4,)).__setitem__(3, 1)),
        "vars/1: its chunks are not those that its shape asks for",
    ),
    "32 the same bytes again and again": (shared_bytes, "shares its bytes with other tensors"),
    "32 text": (shared_text, "@layer_names: holds more than 32 MB of text"),
    # 33: structures
    "33 a cycle of hard links": (lambda: hdf5(lambda group: group.__setitem__("self", group)), "a second time"),
    "33 a cycle through the root": (lambda: hdf5(lambda g: g.__setitem__("self", g.file["/"])), "a second time"),
    "33 one dataset twice": (lambda: hdf5(lambda group: group.__setitem__("1", group["0"])), "a second time"),
    "33 unknown filter": (lambda: hdf5(bomb((64,), (64,), True, compression="lzf")), "vars/1: is stored through HDF5"),
    "33 text": (lambda: hdf5(link("text")), "vars/1: holds values of variable length, which is no tensor"),
    "33 fixed text": (lambda: hdf5(link(np.array([b"text"]))), "vars/1: holds text, which is no tensor"),
    "33 sequences": (
        lambda: hdf5(lambda group: group.create_dataset("1", (1,), h5py.vlen_dtype("f4"))),
        "vars/1: holds values of variable length",
    ),
    "33 references": (lambda: hdf5(lambda g: g.create_dataset("1", (1,), h5py.ref_dtype)), "vars/1: holds references"),
    "33 records": (lambda: hdf5(link(np.zeros(2, "f4,f4"))), "vars/1: holds records, which is no tensor"),
    "33 enumeration": (
        lambda: hdf5(lambda group: group.create_dataset("1", (1,), h5py.enum_dtype({"A": 0, "B": 1}, "i1"))),
        "vars/1: holds enumerations",
    ),
    "33 big-endian": (lambda: hdf5(link(np.arange(4, dtype=">f4"))), "vars/1: holds floats of an unusual form"),
    "33 no element": (lambda: hdf5(link(h5py.Empty("f4"))), "vars/1: holds nothing, which is no tensor"),
    "33 tree in itself": (lambda: patched(hdf5(), TREE, b"\x01", 5), "no B-tree where one should be"),
    "33 header in itself": (endless_header, "its structures lie within one another"),
    "33 deep groups": (lambda: hdf5(lambda group: group.create_group("/".join("x" * 5000))), "a name that is too long"),
    "33 long name": (lambda: hdf5(link(WEIGHTS, "x" * 5000)), "is malformed"),
    "33 name with a slash": (lambda: patched(hdf5(link(WEIGHTS, "abc")), b"abc\0", b"a/c"), "or not its own"),
    "33 two of one name": (lambda: patched(hdf5(link(WEIGHTS, "1")), b"1\0", b"0"), "or not its own"),
    "33 name of no text": (lambda: patched(hdf5(link(WEIGHTS, "abc")), b"abc\0", b"\xff\xfe"), "is malformed"),
    "33 heap with an object of all memory": (lambda: patched(hdf5(), GCOL, UNDEFINED, 24), OPENS),
    "33 heap of all memory": (lambda: patched(hdf5(), GCOL, UNDEFINED, 8), "no heap where one should be"),
    "33 names elsewhere": (lambda: patched(hdf5(), HEAP, UNDEFINED, 24), "bytes 18446744073709551615 to"),
    "33 superblock of the future": (lambda: patched(hdf5(), b"HDF", b"\x09", 7), "superblock of version 9"),
    "33 cut off": (lambda: hdf5()[:-1], "is the download complete?"),
    "33 layer not there": (
        lambda: legacy(lambda file: file.attrs.__setitem__("layer_names", [b"conv"])),
        "conv: is listed in layer_names and is not there",
    ),
    "33 weight not there": (
        lambda: legacy(lambda file: file["dense"].attrs.__setitem__("weight_names", [b"../../x"])),
        "dense/../../x: is listed in weight_names and is not there",
    ),
    # 34: configs
    "34 gadgets": (lambda: archive(GADGET), OPENS),
    "11 two configs": (lambda: archive(None, None, config__json=b""), "two of its zip members have one name"),
    "34 nested config": (
        lambda: legacy(lambda file: file.attrs.__setitem__("model_config", nested_json(100_000))),
        "model_config: is too large or too deeply nested",
    ),
    "34 config of another kind": (lambda: archive([1, 2]), "config.json: is no JSON object"),
    "34 layers of another kind": (lambda: archive({"config": {"layers": [[1]]}}), "config: is malformed"),
    "34 names of another kind": (
        lambda: archive({"config": {"layers": [{"class_name": "Dense", "config": {"name": [1]}}]}}),
        "config: is malformed",
    ),
    "34 long names in a config": (
        lambda: archive({"config": {"layers": [{"class_name": "D" * 1000, "config": {"name": "dense"}}]}}),
        "config: is malformed: a layer whose path has 1007 characters",
    ),
    "34 weights from elsewhere": (
        lambda: archive({"config": {"layers": [{"class_name": "Conv2D", "config": {"name": "x"}}]}}),
        OPENS,
    ),
    "34 nameless weights from elsewhere": (
        lambda: archive(
            {"config": {"layers": [{"class_name": "Conv2D", "config": {"name": "x"}}]}},
            hdf5(lambda group: group.attrs.pop("name") and None),
        ),
        "layers/dense: has no layer in the model's config",
    ),
    # archives
    "17 flipped bit": (lambda: patched(archive(), WEIGHTS[3:5].tobytes(), b"\x01"), "h5: its CRC-32 differs"),
    "14 deflate bomb": (
        lambda: archive(None, bytes(300 << 20), zipfile.ZIP_DEFLATED),
        "model.weights.h5: unpacks to more than 256 MB",
    ),
    "14 config bomb": (
        lambda: archive({"x": "y" * (9 << 20)}, None, zipfile.ZIP_DEFLATED),
        "its config.json takes more than 8,388,608 bytes",
    ),
    "12 encrypted": (lambda: patched(patched(archive(), LOCAL, b"\1", 6, 2), CENTRAL, b"\1", 8, 2), HEADERS),
    "12 another name in its header": (lambda: patched(archive(), b"model.weights", b"nodel"), HEADERS),
    "16 weights beyond the end": (lambda: patched(archive(), CENTRAL, b"\xff\xff\xff\x7f", 42, 2), "lie outside its"),
    "no HDF5 within": (lambda: archive(None, b"x" * 100), "is malformed: no HDF5 where it should be"),
    "no tensor": (lambda: h5(lambda file: None), "is HDF5, but holds no Keras weights"),
    "nothing after the signature": (b"\x89HDF\r\n\x1a\n", "is the download complete?"),
}


def h5(build: Build) -> bytes:
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        build(file)
    return stream.getvalue()


def watch(*files: Path) -> dict[str, Any]:
    here = Path(__file__).parent
    command = [sys.executable, here / "watched.py", here.parents[1], *files]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (child.returncode, child.stderr) == (0, "")
    return json.loads(child.stdout)


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every case, all in one child; what they point at lies beside them."""
    folder = tmp_path_factory.mktemp("attacks")
    (folder / "secret.bin").write_bytes(b"SECRET__" * 8)
    (folder / "secret.h5").write_bytes(h5(lambda file: file.__setitem__("s", np.zeros(16, "f4"))))
    files = [folder / f"{index}.h5" for index in range(len(CASES))]
    for file, (data, _) in zip(files, CASES.values(), strict=True):
        file.write_bytes(data if isinstance(data, bytes) else data())
    return dict(zip(CASES, watch(*files).values(), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_file_is_refused_in_one_line_or_harmless(case: str, outcomes: dict[str, Any]) -> None:
    outcome, words = outcomes[case], CASES[case][1]
    assert outcome.pop("broken") == []
    if words == OPENS:
        assert outcome == {"tensors": {"dense/kernel": WEIGHTS.tobytes().hex()}}
    else:
        assert outcome.keys() == {"refusal"}
        assert words in outcome["refusal"]
        assert outcome["refusal"].isprintable()


DAMAGE = """
import random, resource, signal, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
from converters.errors import CheckpointError
from converters.readers import open_checkpoint
path = Path(sys.argv[1])
data, rng, outcomes = path.read_bytes(), random.Random(0), {"read": 0, "refused": 0}

def attempt(damaged):
    path.write_bytes(damaged)
    signal.alarm(5)
    try:
        for tensor in open_checkpoint(path).tensors.values():
            assert len(tensor.read()) == tensor.spec.nbytes
        outcomes["read"] += 1
    except CheckpointError as error:
        assert str(error).isprintable(), error
        outcomes["refused"] += 1
    signal.alarm(0)

for length in range(0, len(data), 17):
    attempt(data[:length])
assert outcomes["read"] == 0
for _ in range(1500):
    damaged = bytearray(data)
    damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    attempt(damaged)
print(outcomes["read"] > 0, outcomes["refused"] > 0)
"""


@pytest.mark.parametrize("form", ["weights.h5", "h5", "keras"])
def test_damage_is_refused_or_harmless(form: str, tmp_path: Path) -> None:
    """HDF5 has no checksum: a flipped bit may change a value, but nothing hangs, crashes or escapes."""
    path = tmp_path / f"damaged.{form}"
    path.write_bytes({"weights.h5": hdf5, "h5": lambda: legacy(lambda _: None), "keras": archive}[form]())
    done = subprocess.run(
        [sys.executable, "-c", DAMAGE, path],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(keras.__file__).parents[3],
    )
    assert (done.stdout, done.stderr) == ("True True\n", "")
