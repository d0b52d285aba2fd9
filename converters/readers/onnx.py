"""ONNX models: the initializers of their graph, and the tensors of its Constant nodes.

    model:   1 IR version | 2, 3 producer, its version | 7 graph | 8 opset (1 domain, 2 version) | 25 function
    graph:   1 node | 5 initializer | 15 sparse initializer (1 its values)
    node:    2 output | 4 op | 5 attribute: 1 name, 5 tensor, 6 graph, 11 graphs
    tensor:  8 name | 13 external data (1 key, 2 value) | 14 whether that is where its bytes are

These are fields of onnx/onnx.proto; how a tensor holds its numbers stands with `tensor_protos.ONNX`. External data lie
in files beside the model or below. A Constant node's tensor goes by the node's output. Nothing is run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.folders import find_beside
from converters.readers.protobuf import Malformed, Message, Span, blame, fields
from converters.readers.tensor_protos import FLOATS, ONNX, check_shape, lazy_tensor
from converters.tensors import LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "ONNX"
NUMBERS, BYTES = {1, 5}, {2, 3, 4, 6, 7, 8, 14, 20, 25, 26}  # fields of a model
IR_VERSION, GRAPH = 1, 7
MAX_DEPTH = 8  # of graphs in nodes
MAX_NODES = 1 << 17
MAX_PREFIX = 512  # characters before the name of every node of a function


def accepts(path: Path, head: bytes) -> bool:
    """Whether the file begins with an IR version and, as far as it goes, a model's fields follow up to the graph."""
    if path.is_dir() or not head.startswith(b"\x08"):
        return False
    seen: list[int] = []
    try:
        for number, value in fields(Span.whole(SourceFile(path))):
            if number not in (NUMBERS if isinstance(value, int) else BYTES) or len(seen) > GRAPH:
                return False
            seen.append(number)
            if number == GRAPH:
                return seen[0] == IR_VERSION
    except Malformed:  # cut off in the graph, most likely
        return seen[:1] == [IR_VERSION] and len(seen) > 1
    return False


def read(path: Path) -> Contents:
    """All initializers, and the Constant nodes' tensors that can be weights: floats with an axis."""
    source = SourceFile(path)
    with blame(source):
        model = Message(Span.whole(source))
        found = _Found(source)
        found.walk(model.message(GRAPH))
        for function in model.messages(25):
            found.visit(function, 7, f"{function.text(1)[:MAX_PREFIX]}/", 0)
        producer = f"{model.text(2)} {model.text(3)}".strip()
        opsets = {opset.text(1) or "ai.onnx": opset.integer(2) for opset in model.messages(8)}
        beside = {"ir_version": model.integer(IR_VERSION), "opset": opsets}
        beside |= {entry.text(1): entry.text(2) for entry in model.messages(14)}
    return Contents(
        tree={**beside, **found.tree},
        files=(source, *found.files.values()),
        integrity="none in format",
        writer=producer or None,
        set_aside={f"{found.left} Constant nodes": "integers, text and scalars of the graph"} if found.left else {},
    )


@dataclass
class _Found:
    source: SourceFile
    tree: dict[str, Any] = field(default_factory=dict)
    files: dict[str, SourceFile] = field(default_factory=dict)  # of external data, by location
    nodes: int = 0
    left: int = 0  # Constant nodes that are no weights

    def walk(self, graph: Message, depth: int = 0) -> None:
        """Everything in a graph and in the graphs of its nodes."""
        if depth > MAX_DEPTH:
            raise UnsafeCheckpoint(f"nests graphs more than {MAX_DEPTH} deep", file=self.source.path)
        for tensor in graph.messages(5):
            self.add(tensor.text(8), self.open(tensor.text(8), tensor))
        for sparse in graph.messages(15):
            self.add(sparse.message(1).text(8), "left out: it is sparse")
        self.visit(graph, 1, "", depth)

    def visit(self, parent: Message, number: int, prefix: str, depth: int) -> None:
        """The nodes in a graph or a function."""
        for node in parent.messages(number):
            self.nodes += 1
            if self.nodes > MAX_NODES:
                raise UnsafeCheckpoint(f"has more than {MAX_NODES} nodes", file=self.source.path)
            for attribute in node.messages(5):
                for part in (*attribute.parts(6), *attribute.parts(11)):
                    self.walk(Message(part), depth + 1)
            if node.text(4) == "Constant":
                self.constant(prefix + node.text(2), node)

    def constant(self, name: str, node: Message) -> None:
        values = [attribute.message(5) for attribute in node.messages(5) if attribute.is_bytes(5)]
        leaf = self.open(name, values[-1]) if values else None
        if isinstance(leaf, LazyTensor) and leaf.spec.shape and leaf.spec.dtype in FLOATS:
            self.add(name, leaf)
        else:
            self.left += 1

    def add(self, name: str, leaf: LazyTensor | str) -> None:
        if name in self.tree:
            raise DamagedCheckpoint("is the name of two tensors", file=self.source.path, tensor=name)
        self.tree[name] = leaf

    def open(self, name: str, tensor: Message) -> LazyTensor | str:
        """A TensorProto, unread; a sentence where it holds no numbers."""
        with blame(self.source, name):
            dtype = tensor.integer(2)
            if dtype not in ONNX.dtypes:
                return ONNX.refusal(dtype)
            spec = TensorSpec(name, check_shape(tensor.integers(1)), ONNX.dtypes[dtype])
            if tensor.integer(14):
                return LazyTensor(spec, self.external(spec, tensor))
            return lazy_tensor(tensor, spec, ONNX, self.source)

    def external(self, spec: TensorSpec, tensor: Message) -> Callable[[], memoryview]:
        """The way to bytes in another file."""
        entries = {entry.text(1): entry.text(2) for entry in tensor.messages(13)}
        location = entries.get("location", "")
        if location not in self.files:
            self.files[location] = self.locate(location, spec.name)
        file = self.files[location]
        texts = entries.get("offset", "0"), entries.get("length", str(spec.nbytes))
        if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in texts):
            raise Malformed(f"its offset or length is no number: {printable(', '.join(texts))}")
        offset, length = map(int, texts)
        if length != spec.nbytes:
            raise Malformed(f"its {length} bytes are not a {spec.dtype} tensor of shape {spec.shape}")
        if offset + length > file.size:
            problem = f"bytes {offset} to {offset + length} lie outside its {file.size}"
            raise DamagedCheckpoint(problem, file=file.path, tensor=spec.name, cure="is the download complete?")
        return partial(file.read, offset, length, spec.name)

    def locate(self, location: str, tensor: str) -> SourceFile:
        """The file of that name beside the model."""
        try:
            return SourceFile(find_beside(self.source.path, location))
        except CheckpointError as error:
            raise type(error)(error.problem, file=error.file, tensor=tensor, cure=error.cure) from error
