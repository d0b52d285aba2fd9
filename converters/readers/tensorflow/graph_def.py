"""Frozen TensorFlow graphs: a GraphDef with every variable turned into a constant.

    graph:  1 node | 2 library: 1 function (1 signature: 1 name; 3 node) | 4 versions: 1 producer
    node:   1 name | 2 op | 3 input | 5 attribute: 1 name, 2 value (8 tensor)

Of the nodes (tensorflow/core/framework/graph.proto) only constants are read, and what joins a partitioned variable;
nothing is run. A constant goes by its node's name: that of the variable, or in TensorFlow 2 that of its reader
(`dense/MatMul/ReadVariableOp/resource`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.protobuf import Malformed, Message, Span, blame, fields
from converters.readers.tensor_protos import (
    FLOATS,
    MAX_FILLED,
    TENSORFLOW,
    lazy_tensor,
    read_numbers,
    tensorflow_shape,
)
from converters.readers.tensorflow.slices import Box, join
from converters.tensors import LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read", "read_constants"]

FORMAT = "TensorFlow frozen graph"
NODE, LIBRARY, VERSIONS, TENSOR = 1, 2, 4, 8
KNOWN = range(1, 6)  # fields of a graph
STRING = 7  # TensorFlow's DataType
MAX_NODES = 1 << 17
MAX_CHAIN = 64  # of Identities
MAX_PARTS = 1024  # of a partitioned variable
MAX_PREFIX = 512  # characters before the name of every node of a function
ASIDE = "integers, text and scalars of the graph"


def accepts(path: Path, head: bytes) -> bool:
    """Whether the file's first field is a node with a name and an op."""
    if path.is_dir() or not head.startswith(b"\n"):
        return False
    try:
        number, value = next(fields(Span.whole(SourceFile(path))))
        node = Message(value) if isinstance(value, Span) else Message(b"")
        return number == NODE and node.text(1) != "" and node.text(2).isidentifier()
    except Malformed:
        return False


def read(path: Path) -> Contents:
    """The constants that can be weights: floats, if they have an axis or were a variable."""
    source = SourceFile(path)
    graph = Span.whole(source)
    tree, set_aside = read_constants(graph)
    with blame(source):
        versions = [value for number, value in fields(graph) if number == VERSIONS and isinstance(value, Span)]
        producer = Message(versions[-1]).integer(1) if versions else 0
    return Contents(
        tree=tree,
        files=(source,),
        integrity="none in format",
        writer=f"TensorFlow graph (producer version {producer})" if producer else None,
        set_aside=set_aside,
    )


def read_constants(graph: Span) -> tuple[dict[str, Any], dict[str, str]]:
    """The weights in a graph, unread, and what other constants are set aside. Raises CheckpointError."""
    file = graph.file.source
    found = _Found(file)
    with blame(file):
        for count, (prefix, node) in enumerate(_nodes(graph)):
            if count == MAX_NODES:
                raise UnsafeCheckpoint(f"has more than {MAX_NODES} nodes", file=file.path)
            found.add(prefix, Message(node))
    tree = found.weights()
    count = len(found.constants) - len(tree)
    found.join_parts(tree)
    return tree, {f"{count} constants": ASIDE} if count else {}


def _nodes(graph: Span) -> Iterator[tuple[str, memoryview | Span]]:
    """Every node, and what stands before its name: nothing, or its function's."""
    for number, value in fields(graph):
        if number not in KNOWN:
            raise Malformed(f"a graph has no field {number}")
        if number == NODE and not isinstance(value, int):
            yield "", value
        elif number == LIBRARY and not isinstance(value, int):
            for function in Message(value).messages(1):
                prefix = f"{function.message(1).text(1)}/"
                if len(prefix) > MAX_PREFIX:
                    raise Malformed(f"a function's name takes {len(prefix)} characters")
                for node in function.parts(3):
                    yield prefix, node


@dataclass
class _Found:
    """What of a graph matters, by the names of its nodes."""

    file: SourceFile
    constants: dict[str, Message] = field(default_factory=dict)  # its TensorProto
    reads: dict[str, str] = field(default_factory=dict)  # an Identity: its input
    concats: list[tuple[list[str], str]] = field(default_factory=list)  # what is joined, the axis

    def add(self, prefix: str, node: Message) -> None:
        op = bytes(node.view(2))
        if op not in (b"Const", b"Identity", b"ConcatV2", b"Concat"):
            return
        name = prefix + node.text(1)
        if op == b"Const":
            if name in self.constants:
                raise DamagedCheckpoint("is the name of two nodes", file=self.file.path, tensor=name)
            values = [attribute.message(2) for attribute in node.messages(5) if attribute.text(1) == "value"]
            self.constants[name] = values[-1].message(TENSOR) if values else Message(b"")
            return
        inputs = [prefix + text.partition(":")[0] for text in node.texts(3) if not text.startswith("^")]
        if op == b"Identity":
            self.reads[name] = inputs[0] if inputs else ""
        elif 2 < len(inputs) <= MAX_PARTS:
            axis = inputs.pop(0 if op == b"Concat" else -1)
            self.concats.append((inputs, axis))

    def weights(self) -> dict[str, Any]:
        """The constants that can be weights."""
        variables = set(self.reads.values())
        tree: dict[str, Any] = {}
        for name, proto in self.constants.items():
            with blame(self.file, name):
                dtype, shape = proto.integer(1), tensorflow_shape(proto.message(2))
                kind = TENSORFLOW.dtypes.get(dtype)
                if kind in FLOATS and (shape or name in variables):
                    spec = TensorSpec(name, shape, kind)
                    tree[name] = lazy_tensor(proto, spec, TENSORFLOW, self.file)
                elif kind is None and dtype != STRING:
                    tree[name] = TENSORFLOW.refusal(dtype)
        return tree

    def join_parts(self, tree: dict[str, Any]) -> None:
        for inputs, axis in self.concats:
            self.join(tree, [self.origin(name) for name in inputs], self.number(self.origin(axis)))

    def origin(self, name: str) -> str:
        """The node that a chain of Identities begins with."""
        for _ in range(MAX_CHAIN):
            if name not in self.reads:
                break
            name = self.reads[name]
        return name

    def join(self, tree: dict[str, Any], names: list[str], axis: int | None) -> None:
        """Put a variable into `tree` in the place of its parts, if that is what `names` are."""
        whole = names[0].removesuffix("/part_0")
        parts = [part for name in names if isinstance(part := tree.get(name), LazyTensor)]
        if names != [f"{whole}/part_{number}" for number in range(len(parts))] or whole in tree or axis is None:
            return
        joined = _join(whole, parts, axis)
        if joined and joined.spec.nbytes <= max(MAX_FILLED, 8 * self.file.size):
            for name in names:
                del tree[name]
            tree[whole] = joined

    def number(self, name: str) -> int | None:
        """The value of a constant, if it is one int32."""
        proto = self.constants.get(name, Message(b""))
        with blame(self.file, name):
            if TENSORFLOW.dtypes.get(proto.integer(1)) != "int32" or tensorflow_shape(proto.message(2)):
                return None
            raw = read_numbers(proto, TensorSpec(name, (), "int32"), TENSORFLOW)()
        return int.from_bytes(raw, "little", signed=True)


def _join(name: str, parts: list[LazyTensor], axis: int) -> LazyTensor | None:
    """The parts of a tensor side by side along an axis; None if they do not fit together."""
    shape, dtype = parts[0].spec.shape, parts[0].spec.dtype
    if not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    before, after = shape[:axis], shape[axis + 1 :]
    pieces: list[tuple[Box, Callable[[], memoryview]]] = []
    at = 0
    for part in parts:
        size = part.spec.shape[axis] if len(part.spec.shape) == len(shape) else 0
        if part.spec.shape != (*before, size, *after) or part.spec.dtype != dtype:
            return None
        pieces.append(((*((0, n) for n in before), (at, size), *((0, n) for n in after)), part.read))
        at += size
    spec = TensorSpec(name, (*before, at, *after), dtype)
    return LazyTensor(spec, partial(join, spec, pieces))
