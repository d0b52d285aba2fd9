"""Damaged and hostile TensorFlow checkpoints: each is refused in one line, in seconds and in little memory."""

from __future__ import annotations

import math
import os
import runpy
import struct
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from converters.errors import CheckpointError
from converters.readers.tensorflow import checkpoint as tensorflow
from converters.tensors import LazyTensor

write = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "readers" / "tensorflow" / "bundle_writer.py"))
)
entry, message = write.entry, write.message

SIX = struct.pack("<6f", *range(6))
STRING = 7
GRAPH = b"_CHECKPOINTABLE_OBJECT_GRAPH"

Rows = dict[bytes, bytes]


def whole(**entries: bytes) -> Rows:
    """A bundle of these entries."""
    return {b"": write.header(), **{name.encode(): row for name, row in entries.items()}}


def slices(shape: tuple[int, ...], *boxes: tuple[tuple[int, int], ...]) -> Rows:
    """A bundle of one tensor, `w`, whose slices lie one after another in the data file."""
    rows, at = whole(w=entry(b"", shape, *(write.box(*box) for box in boxes))), 0
    for box in boxes:
        lengths = [length for _, length in box]
        size = 4 * math.prod(lengths)
        rows[write.slice_key("w", *box)] = entry(SIX[at : at + size], lengths, offset=at, size=size)
        at += size
    return rows


def string(text: bytes, offset: int = 0, shape: tuple[int, ...] = ()) -> tuple[bytes, bytes]:
    """A scalar string tensor's entry and its bytes."""
    length = struct.pack("<I", len(text))
    stored = struct.pack("<I", write.masked(length))
    data = write.varint(len(text)) + stored + text
    return entry(data, shape, dtype=STRING, offset=offset, crc=write.masked(length + stored + text)), data


def graph(*nodes: bytes, **entries: bytes) -> tuple[Rows, bytes]:
    """A bundle with an object graph, and its data file."""
    row, data = string(message(*((1, node) for node in nodes)), offset=len(SIX))
    return whole(**entries) | {GRAPH: row}, SIX + data


def variable(full_name: bytes, key: bytes) -> bytes:
    return message((2, message((1, b"VARIABLE_VALUE"), (2, full_name), (3, key))))


def everything(prefix: Path) -> dict[str, Any]:
    tree = tensorflow.read(prefix).tree
    return {n: (leaf.spec, bytes(leaf.read())) if isinstance(leaf, LazyTensor) else leaf for n, leaf in tree.items()}


def refusal(prefix: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        everything(prefix)
    assert str(caught.value).startswith(str(prefix))
    assert str(caught.value).isprintable()
    return caught.value


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A bundle with a bit of everything: an object graph, two data files, a tensor in slices."""
    rows, data = graph(variable(b"fc/kernel", b"w"), w=entry(SIX, (2, 3)))
    rows |= {
        b"": write.header(2),
        b"part": entry(b"", (3, 2), write.box((0, 1), (0, 2)), write.box((1, 2), (0, 2))),
        write.slice_key("part", (0, 1), (0, 2)): entry(SIX[:8], (1, 2), shard=1),
        write.slice_key("part", (1, 2), (0, 2)): entry(SIX[8:], (2, 2), shard=1, offset=8),
    }
    return write.bundle(tmp_path / "m", rows, data, SIX)


def test_the_undamaged_bundle_is_read(good: Path) -> None:
    assert {name: raw for name, (_, raw) in everything(good).items()} == {"fc/kernel": SIX, "part": SIX}


@pytest.mark.parametrize("suffix", ["index", "data-00000-of-00002", "data-00001-of-00002"])
def test_a_flip_or_a_cut_anywhere_changes_no_tensor(suffix: str, good: Path) -> None:
    file, before = Path(f"{good}.{suffix}"), everything(good)
    intact, found = file.read_bytes(), 0
    for at, byte in enumerate(intact):
        for damaged in (intact[:at], intact[:at] + bytes([byte ^ 1 << at % 8]) + intact[at + 1 :]):
            file.write_bytes(damaged)
            try:
                assert everything(good) == before
            except CheckpointError as error:
                assert str(error).startswith(str(good)) and str(error).isprintable()
                found += 1
    assert found > 1.8 * len(intact)  # the rest are flips in the metaindex block and the footer's padding


def test_a_missing_data_file_is_named_with_its_tensor(good: Path) -> None:
    Path(f"{good}.data-00001-of-00002").unlink()
    assert str(refusal(good)) == f"{good}.data-00001-of-00002: part: does not exist; it belongs beside the index"


HALVES = ((0, 3),), ((3, 3),)
SIXTEENTHS = list(product([(0, 1), (1, 1)], repeat=4))
CONTRADICTIONS: dict[str, tuple[Rows, str]] = {
    "past the end": (whole(w=entry(SIX, (6,), offset=8)), "w: bytes 8 to 32 lie outside its 24"),
    "before the start": (whole(w=entry(SIX, (6,), offset=-8)), "w: bytes -8 to 16 lie outside"),
    "far away": (whole(w=entry(SIX, (6,), offset=2**63 - 1)), "lie outside its 24"),
    "too small": (whole(w=entry(SIX, (7,))), "w: its 24 bytes are not a float32 tensor of shape (7,)"),
    "too large": (whole(w=entry(SIX, (6,), dtype=19)), "24 bytes are not a float16 tensor"),
    "negative size": (whole(w=entry(SIX, (6,), size=-24)), "-24 bytes are not"),
    "overflow": (whole(w=entry(SIX, (1 << 32, 1 << 32))), "w: its shape is absurd"),
    "overflow beside zero": (whole(w=entry(b"", (1 << 62, 0, 4))), "w: its shape is absurd"),
    "negative dimensions": (whole(w=entry(SIX, (-6, -1))), "w: its shape is absurd"),
    "rank": (whole(w=entry(SIX, [1] * 300)), "its shape is absurd, of rank 300"),
    "unknown rank": (whole(w=entry(SIX) + message((2, message((3, 1))))), "its shape is absurd"),
    "no such data file": (whole(w=entry(SIX, (6,), shard=5)), "w: lies in data file 5 of 1"),
    "negative data file": (whole(w=entry(SIX, (6,), shard=-1)), "w: lies in data file -1 of 1"),
    "same bytes": (whole(v=entry(SIX[:8], (2,)), w=entry(SIX, (6,))), "w: shares bytes with another"),
    "no message": (whole(w=b"\x0b"), "w: field 1 has the wire type 3"),
    "text for a number": (whole(w=message((1, b"x"))), "w: field 1 is not a number"),
    "2^31 data files": ({b"": write.header(1 << 31)}, "counts 2147483648 data files"),
    "2^31 - 1 data files": (whole(w=entry(SIX, (6,))) | {b"": write.header((1 << 31) - 1)}, "w: does not exist"),
    "no data file": ({b"": write.header(0)}, "counts 0 data files"),
    "big-endian": ({b"": write.header(1, (2, 1))}, "big-endian"),
    "newer": ({b"": message((1, 1), (3, message((1, 9), (2, 9))))}, "asks for a reader of version 9"),
    "no header": ({b"w": entry(SIX, (6,))}, "no header"),
    "no UTF-8": (whole() | {b"\xff": entry(SIX, (6,))}, ": \\xff: its name is not UTF-8"),
    "terminal codes": (whole(**{"\x1b[2Jw": entry(SIX, (7,))}), ": \\x1b[2Jw: its 24 bytes"),
    "slices overlap": (slices((6,), ((0, 4),), ((3, 2),)), "w: its 2 slices overlap or do not cover its shape (6,)"),
    "slices leave a hole": (slices((6,), ((0, 3),), ((4, 2),)), "overlap or do not cover"),
    "slices do both": (slices((6,), ((0, 3),), ((2, 3),)), "overlap or do not cover"),
    "slices lie beyond": (slices((4,), *HALVES), "overlap or do not cover"),
    "slices split four axes": (slices((2, 2, 2, 2), *SIXTEENTHS), "split 4 axes"),
    "a slice twice": (slices((3,), ((0, 3),), ((0, 3),)), "its slice ((0, 3),) is missing"),
    "a slice of another rank": (slices((6, 1), *HALVES), "a slice has 1 axes, not 2"),
    "a slice of another type": (
        slices((6,), *HALVES) | {write.slice_key("w", (3, 3)): entry(SIX[12:], (3,), dtype=3, offset=12)},
        "its slice ((3, 3),) holds another dtype or shape",
    ),
    "a slice in slices": (
        slices((6,), *HALVES) | {write.slice_key("w", (3, 3)): entry(b"", (3,), write.box((0, 3)))},
        "is a slice that has slices",
    ),
    "a slice of nothing": (slices((6,), *HALVES) | whole(w=entry(SIX, (6,))), "is the slice of no tensor"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_contradiction_is_refused(name: str, tmp_path: Path) -> None:
    rows, words = CONTRADICTIONS[name]
    assert words in str(refusal(write.bundle(tmp_path / "m", rows, SIX)))


OPTIMIZER = message((1, message((1, 99), (2, b"_variables"))), (1, message((1, 99), (2, b"_iterations"))))
GRAPHS: dict[str, tuple[tuple[Rows, bytes], str]] = {
    "no message": (graph(b"\xff"), "no number ends"),
    "an absent node": (graph(OPTIMIZER), "the object graph has no node 99"),
    "a name in another alphabet": (graph(variable(b"\xff", b"w")), "field 2 is not UTF-8"),
    "two tensors of one name": (
        graph(
            variable(b"b", b"v/.ATTRIBUTES/VARIABLE_VALUE"),
            variable(b"b/.OPTIMIZER_SLOT/m", b"a"),
            **dict.fromkeys(("a", "v/.ATTRIBUTES/VARIABLE_VALUE", "v/.OPTIMIZER_SLOT/m"), entry(b"", (0,))),
        ),
        "b/.OPTIMIZER_SLOT/m: is the name of two tensors",
    ),
    "numbers": ((whole(**{GRAPH.decode(): entry(SIX[:4])}), SIX), "is not one string"),
    "several": ((whole(**{GRAPH.decode(): string(b"", shape=(1,))[0]}), SIX), "is not one string"),
    "strings of other lengths": (
        (whole(**{GRAPH.decode(): entry(b"\x7f" + SIX, (), dtype=STRING)}), b"\x7f" + SIX),
        "strings of 127 bytes in 25",
    ),
    "strings of another CRC": (
        (whole(**{GRAPH.decode(): entry(b"\0" + SIX[:4], (), dtype=STRING)}), b"\0" + SIX),
        "its CRC-32C differs",
    ),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_damaged_object_graph_is_refused(name: str, tmp_path: Path) -> None:
    (rows, data), words = GRAPHS[name]
    error = refusal(write.bundle(tmp_path / "m", rows, data))
    assert words in str(error)
    assert GRAPH.decode() in str(error) or name == "two tensors of one name"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "has no footer of a table; is the download complete?"),
        (b"version https://git-lfs.github.com/spec/v1\n", "has no footer of a table"),
        (write.table(), "is a table, but not a TensorFlow bundle's"),
        (write.table(b"\0\1\0w"), "is a table, but not a TensorFlow bundle's"),
    ],
)
def test_an_index_that_is_none(content: bytes, words: str, tmp_path: Path) -> None:
    write.bundle(tmp_path / "m", {}, SIX)
    (tmp_path / "m.index").write_bytes(content)
    assert tensorflow.accepts(tmp_path / "m.index", content)
    assert words in str(refusal(tmp_path / "m"))


@pytest.mark.parametrize("table", [write.table(b""), write.table(b"\0\0\2\x08\1", keys=[b""])])
def test_a_table_that_is_no_checkpoint_is_called_that(table: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.ckpt").write_bytes(table)
    assert tensorflow.accepts(tmp_path / "model.ckpt", b"")
    assert "is a table, but not a checkpoint" in str(refusal(tmp_path / "model.ckpt"))


WHOLE = ((0, -1), (0, -1))
TOP, BOTTOM = ((0, 1), (0, -1)), ((1, 2), (0, -1))
FLOATS = message((5, SIX))


def first(path: Path, rows: Rows, *tensors: bytes, compression: int = 0) -> Path:
    path.write_bytes(write.first_format(rows, *tensors, compression=compression))
    return path


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    """Two tables of the first format, one compressed, that share a tensor."""
    rows = {write.slice_key("w", *WHOLE): FLOATS, write.slice_key("part", *TOP): message((5, SIX[:8]))}
    tensors = write.listed("w", (2, 3), WHOLE), write.listed("part", (3, 2), TOP)
    first(tmp_path / "m-00000-of-00002", rows, *tensors, compression=1)
    rows = {write.slice_key("part", *BOTTOM): message((5, SIX[8:]))}
    first(tmp_path / "m-00001-of-00002", rows, write.listed("part", (3, 2), BOTTOM))
    return tmp_path / "m"


def test_the_undamaged_tables_are_read(tables: Path) -> None:
    assert {name: raw for name, (_, raw) in everything(tables).items()} == {"w": SIX, "part": SIX}


@pytest.mark.parametrize("number", [0, 1])
def test_a_flip_or_a_cut_of_a_table_changes_no_tensor(number: int, tables: Path) -> None:
    file, before = Path(f"{tables}-{number:05}-of-00002"), everything(tables)
    intact, found = file.read_bytes(), 0
    for at, byte in enumerate(intact):
        for damaged in (intact[:at], intact[:at] + bytes([byte ^ 1 << at % 8]) + intact[at + 1 :]):
            file.write_bytes(damaged)
            try:
                assert everything(tables) == before
            except CheckpointError as error:
                assert str(error).startswith(str(file)) and str(error).isprintable()
                found += 1
    assert found > 1.7 * len(intact)  # the rest are flips in the metaindex block and the padding


def test_a_missing_table_is_named(tables: Path) -> None:
    Path(f"{tables}-00001-of-00002").unlink()
    assert str(refusal(tables)) == f"{tables}-00001-of-00002: does not exist"


KEY = write.slice_key("w", (0, -1))
LINE = ((0, -1),)
TABLES: dict[str, tuple[Rows, bytes, str]] = {
    "listed only": ({}, write.listed("w", (6,), LINE), "w: is listed, but not there; fetch it again"),
    "too few": ({KEY: message((5, SIX[:20]))}, write.listed("w", (6,), LINE), "w: its 5 numbers are not a tensor of"),
    "too many": ({KEY: FLOATS}, write.listed("w", (5,), LINE), "w: its 6 numbers are not a tensor of shape (5,)"),
    "half a number": ({KEY: message((5, SIX[:23]))}, write.listed("w", (6,), LINE), "w: its 23 bytes are no float32"),
    "another field": ({KEY: message((6, SIX))}, write.listed("w", (6,), LINE), "w: its 0 numbers are not a tensor"),
    "half a varint": ({KEY: message((7, b"\x80"))}, write.listed("w", (1,), LINE, dtype=3), "w: packed numbers do not"),
    "a long varint": (
        {KEY: message((7, b"\x80" * 10 + b"\1"))},
        write.listed("w", (1,), LINE, dtype=3),
        "w: packed numbers do not end where they should",
    ),
    "no slice": ({KEY: FLOATS}, write.listed("w", (6,)), "w: its 0 slices overlap or do not cover its shape (6,)"),
    "a slice twice": ({KEY: FLOATS}, write.listed("w", (6,), LINE, LINE), "w: its 2 slices overlap"),
    "a slice of another rank": ({KEY: FLOATS}, write.listed("w", (6, 1), LINE), "w: a slice has 1 axes, not 2"),
    "too large": ({KEY: FLOATS}, write.listed("w", (1 << 40,), LINE), "takes more than all tables can hold"),
    "overflow": ({KEY: FLOATS}, write.listed("w", (1 << 40, 1 << 40), WHOLE), "w: its shape is absurd"),
    "no message": ({KEY: b"\x0b"}, write.listed("w", (6,), LINE), "w: field 1 has the wire type 3"),
    "terminal codes": ({}, write.listed("\x1b[2J", (1 << 40,), LINE), ": \\x1b[2J: its shape"),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_that_contradicts_itself_is_refused(name: str, tmp_path: Path) -> None:
    rows, tensor, words = TABLES[name]
    assert words in str(refusal(first(tmp_path / "m", rows, tensor)))


def test_tables_that_contradict_each_other_are_refused(tables: Path) -> None:
    first(Path(f"{tables}-00001-of-00002"), {}, write.listed("part", (3, 3), BOTTOM))
    assert "part: has another shape or dtype in another file" in str(refusal(tables))


FILLED = (1 << 18) - 20  # fields of a message: just not too many
BOMBS: dict[str, tuple[Rows, bytes, str]] = {
    "dimensions": (whole(w=message((1, 1), (2, b"\x12\x00" * FILLED))), b"", "of rank 262124"),
    "slices": (whole(**{f"w{n}": entry(b"", (1,)) + b"\x3a\x00" * FILLED for n in range(3)}), b"", "0 axes, not 1"),
    "entries": (whole(**{f"w{n}": b"" for n in range((1 << 17) + 1)}), b"", "lists more than 131072 tensors"),
    "nodes": (*graph(*[b""] * FILLED), "0 tensors"),
    "a node's children": (*graph(*[b"\x0a\x00" * FILLED] * 3), "0 tensors"),
    "a large graph": (*graph(bytes(5 << 20)), "is beyond reason"),
}
READ = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from converters.errors import CheckpointError
from converters.readers.tensorflow import checkpoint as tensorflow
try:
    print(len(tensorflow.read(Path(sys.argv[1])).tree), "tensors")
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_small_file_costs_little_memory(name: str, tmp_path: Path) -> None:
    rows, data, words = BOMBS[name]
    prefix = write.bundle(tmp_path / "m", rows, data)
    done = subprocess.run(
        [sys.executable, "-c", READ, prefix],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(tensorflow.__file__).parents[3],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert (words in done.stdout, done.stderr) == (True, "")


def test_an_index_that_claims_terabytes_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "m.index", "wb") as file:
        file.truncate(1 << 42)
    assert "is beyond reason" in str(refusal(tmp_path / "m"))
