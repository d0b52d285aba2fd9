"""Damaged and hostile protocol buffers, TensorFlow's graphs and ONNX's: each in a child that watches what is opened."""

from __future__ import annotations

import runpy
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from converters.errors import CheckpointError
from converters.readers import open_checkpoint

write = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "readers" / "tensorflow" / "bundle_writer.py"))
)
message = write.message

SIX = struct.pack("<6f", *range(6))
MANY = (1 << 18) + 1


def dims(*shape: int) -> bytes:
    return message(*((2, message((1, size))) for size in shape))


def proto(*fields: tuple[int, int | bytes], shape: tuple[int, ...] = (2, 3), dtype: int = 1) -> bytes:
    """A TensorProto of TensorFlow."""
    return message((1, dtype), (2, dims(*shape)), *fields)


def node(name: bytes, op: bytes, *inputs: bytes, value: bytes | None = None) -> bytes:
    attribute = [] if value is None else [(5, message((1, b"value"), (2, message((8, value)))))]
    return message((1, name), (2, op), *((3, one) for one in inputs), *attribute)


def graph(*nodes: bytes, library: bytes = b"") -> bytes:
    return message(*((1, one) for one in nodes), *([(2, library)] if library else []), (4, message((1, 7))))


def tensor(*fields: tuple[int, int | bytes], name: bytes = b"w", shape: tuple[int, ...] = (2, 3)) -> bytes:
    """A TensorProto of ONNX."""
    return message(*((1, size) for size in shape), (2, 1), (8, name), *fields)


def model(*tensors: bytes, more: bytes = b"") -> bytes:
    held = message(*((5, one) for one in tensors)) + more
    return message((1, 8), (2, b"nobody"), (7, held), (8, message((2, 17))))


def nested(depth: int) -> bytes:
    inner = message((5, tensor((9, SIX))))
    for _ in range(depth):
        inner = message((1, message((4, b"If"), (5, message((1, b"branch"), (6, inner))))))
    return inner


SOUND = {
    "graph": graph(
        node(b"w", b"Const", value=proto((4, SIX))),
        node(b"v", b"Const", value=proto((5, SIX))),
        node(b"w/read", b"Identity", b"w"),
    ),
    "onnx": model(tensor((9, SIX)), tensor((4, SIX), name=b"v")),
}


def opened(path: Path) -> dict[str, Any]:
    return {name: (tensor.spec, bytes(tensor.read())) for name, tensor in open_checkpoint(path).tensors.items()}


@pytest.mark.parametrize("form", SOUND)
def test_a_flip_or_a_cut_raises_nothing_else(form: str, spoil: Callable[..., Any], tmp_path: Path) -> None:
    """There is no checksum: a flip of a weight's bit is a weight, and a cut between two nodes is not seen."""
    path, intact = tmp_path / form, SOUND[form]
    path.write_bytes(intact)
    assert {name: raw for name, (_, raw) in opened(path).items()} == {"w": SIX, "v": SIX}
    found = 0
    for _, data in spoil(intact):
        path.write_bytes(data)
        try:
            opened(path)
        except CheckpointError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()
            found += 1
    assert found > 3 * len(intact)


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "graph: terabytes of one number": (
        lambda: graph(node(b"w", b"Const", value=proto((5, SIX[:4]), shape=(1 << 40,)))),
        "w: 4 bytes are too few for a float32 tensor of shape (1099511627776,)",
    ),
    "graph: more numbers than elements": (
        lambda: graph(node(b"w", b"Const", value=proto((5, SIX), shape=(5,)))),
        "w: its 6 numbers are not a tensor of shape (5,)",
    ),
    "graph: other bytes": (
        lambda: graph(node(b"w", b"Const", value=proto((4, SIX[:20])))),
        "w: its 20 bytes are not a float32 tensor of shape (2, 3)",
    ),
    "graph: overflow": (
        lambda: graph(node(b"w", b"Const", value=proto((4, SIX), shape=(1 << 40, 1 << 40)))),
        "w: its shape is absurd",
    ),
    "graph: negative": (
        lambda: graph(node(b"w", b"Const", value=proto((4, SIX), shape=(-2, -3)))),
        "w: its shape is absurd",
    ),
    "graph: rank": (
        lambda: graph(node(b"w", b"Const", value=proto((4, SIX), shape=(1,) * 100_000))),
        "w: its shape is absurd, of rank 100000",
    ),
    "graph: unknown rank": (
        lambda: graph(node(b"w", b"Const", value=message((1, 1), (2, message((3, 1))), (4, SIX)))),
        "w: its shape is absurd, of unknown rank",
    ),
    "graph: one name": (
        lambda: graph(*[node(b"w", b"Const", value=proto((4, SIX)))] * 2),
        "w: is the name of two nodes",
    ),
    "graph: no value": (lambda: graph(node(b"w", b"Const")), "holds no weights"),
    "graph: an unknown field": (lambda: SOUND["graph"] + message((9, b"x")), "a graph has no field 9"),
    "graph: nodes": (lambda: graph(*[node(b"a", b"B")] * (MANY // 2 + 1)), "has more than 131072 nodes"),
    "graph: fields": (
        lambda: graph(node(b"a", b"B"), node(b"a", b"B") + b"\x1a\x00" * MANY),
        "a message has more than 262144 fields",
    ),
    "graph: a long name": (lambda: graph(node(b"w" * (2 << 20), b"Const")), ""),
    "graph: a long name later": (
        lambda: graph(node(b"a", b"B"), node(b"w" * (2 << 20), b"Const")),
        "a name or a shape takes 2097152 bytes",
    ),
    "graph: a long function": (
        lambda: graph(
            node(b"a", b"B"),
            library=message((1, message((1, message((1, b"f" * 100_000))), *[(3, node(b"a", b"B"))] * 100_000))),
        ),
        "a function's name takes 100001 characters",
    ),
    "graph: no UTF-8": (lambda: graph(node(b"a", b"B"), node(b"\xff", b"Const")), "field 1 is not UTF-8"),
    "graph: terminal codes": (
        lambda: graph(node(b"\x1b[2J", b"Const", value=proto((4, SIX), shape=(5,)))),
        ": \\x1b[2J: its 24 bytes",
    ),
    "onnx: terabytes of one number": (
        lambda: model(tensor((4, SIX[:4]), shape=(1 << 40,))),
        "w: 4 bytes are too few for a float32 tensor",
    ),
    "onnx: too few": (lambda: model(tensor((4, SIX[:20]))), "w: its 5 numbers are not a tensor of shape (2, 3)"),
    "onnx: other bytes": (lambda: model(tensor((9, b""))), "w: its 0 bytes are not a float32 tensor of shape (2, 3)"),
    "onnx: half a number": (lambda: model(tensor((4, SIX[:23]))), "w: its 23 bytes are no float32 numbers"),
    "onnx: overflow": (lambda: model(tensor((9, SIX), shape=(1 << 40, 1 << 40))), "w: its shape is absurd"),
    "onnx: rank": (lambda: model(tensor((9, SIX), shape=(1,) * 100_000)), "w: its shape is absurd, of rank 100000"),
    "onnx: one name": (lambda: model(*[tensor((9, SIX))] * 2), "w: is the name of two tensors"),
    "onnx: elsewhere": (
        lambda: model(tensor((13, message((1, b"location"), (2, b"/etc/passwd"))), (14, 1))),
        "w: needs /etc/passwd, which is no file beside it",
    ),
    "onnx: graphs in graphs": (lambda: model(more=nested(30)), "nests graphs more than 8 deep"),
    "onnx: nodes": (lambda: model(more=b"\x0a\x00" * MANY), "a message has more than 262144 fields"),
    "onnx: nodes in branches": (
        lambda: model(more=message(*[(1, message((5, message((6, b"\x0a\x00" * 45_000)))))] * 3)),
        "has more than 131072 nodes",
    ),
    "onnx: no graph": (lambda: message((1, 8), (2, b"nobody"), (3, b"1")), "is not a checkpoint of any known format"),
    "onnx: an empty graph": (lambda: message((1, 8), (2, b"nobody"), (7, b"")), "holds no weights"),
    "onnx: no UTF-8": (lambda: model(tensor((9, SIX), name=b"\xff")), "field 8 is not UTF-8"),
    "onnx: terminal codes": (lambda: model(tensor((9, b""), name=b"\x1b[2J")), ": \\x1b[2J: its 0 bytes"),
}


def test_parts_that_would_join_to_gigabytes_are_left_as_they_are(tmp_path: Path) -> None:
    one = proto((5, SIX[:4]), shape=(16 << 20,))
    parts = [b"w/part_%d" % number for number in range(200)]
    nodes = [node(name, b"Const", value=one) for name in parts]
    axis = node(b"axis", b"Const", value=proto((7, b"\0"), shape=(), dtype=3))
    (tmp_path / "g").write_bytes(graph(*nodes, axis, node(b"w", b"ConcatV2", *parts, b"axis")))
    tensors = open_checkpoint(tmp_path / "g").tensors
    assert [name.encode() for name in tensors] == parts
    assert len(tensors["w/part_0"].read()) == 64 << 20


@pytest.fixture(scope="module")
def outcomes(watch: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return watch({name: lambda file, make=make: file.write_bytes(make()) for name, (make, _) in ATTACKS.items()})


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_one_line(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Within 2 GiB and 10 seconds each, and no other file is opened."""
    outcome = outcomes[name]
    assert outcome["broken"] == []
    assert ATTACKS[name][1] in outcome.get("refusal", outcome)
    assert outcome["refusal"].isprintable() and len(outcome["refusal"]) < 1000
