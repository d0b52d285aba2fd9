"""Tensors in protocol buffers: TensorFlow's TensorProto and ONNX's, which differ in their numbers only.

    TensorFlow   1 dtype | 2 shape (2 dimension: 1 size; 3 unknown rank) | 4 all bytes, or packed numbers in another
    ONNX         1 dimension | 2 dtype | 9 all bytes, or packed numbers in another

Packed numbers are varints unless they are floats; a float16 is there by its bits. Of TensorFlow's constants the last
number stands for all that follow it (tensorflow/core/framework/tensor.proto, onnx/onnx.proto).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from converters.readers.files import SourceFile
from converters.readers.protobuf import Malformed, Message, Span, blame, varints
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = [
    "FLOATS",
    "MAX_FILLED",
    "ONNX",
    "TENSORFLOW",
    "Layout",
    "check_shape",
    "lazy_tensor",
    "read_numbers",
    "tensorflow_shape",
]

FLOATS = ("float64", "float32", "float16", "bfloat16")  # what a constant that is a weight holds
MAX_RANK = 32
MAX_FILLED = 64 << 20  # bytes of a tensor of which the file holds less than an eighth


@dataclass(frozen=True)
class Layout:
    """Which number stands for what."""

    dtypes: Mapping[int, str]
    raw: int  # the field of all bytes
    packed: Mapping[str, int]  # dtype: the field of its numbers
    others: Mapping[int, str]  # what else there is, in words
    fixed: frozenset[str] = frozenset({"float32", "float64", "complex64"})  # packed by their bytes, not as varints
    fills: bool = False  # whether the last number stands for all that are missing

    def refusal(self, dtype: int) -> str:
        """A sentence in a tensor's place."""
        return f"left out: it holds {self.others.get(dtype, f'elements of type {dtype}')}"


TENSORFLOW = Layout(
    dtypes={
        1: "float32",
        2: "float64",
        3: "int32",
        4: "uint8",
        5: "int16",
        6: "int8",
        8: "complex64",
        9: "int64",
        10: "bool",
        14: "bfloat16",
        17: "uint16",
        19: "float16",
        22: "uint32",
        23: "uint64",
        24: "float8_e5m2",
        25: "float8_e4m3fn",
    },
    raw=4,
    packed={
        **{"float32": 5, "float64": 6, "complex64": 9, "int64": 10, "bool": 11, "uint32": 16, "uint64": 17},
        **dict.fromkeys(("int32", "int16", "int8", "uint16", "uint8"), 7),
        **dict.fromkeys(("float16", "bfloat16"), 13),
        **dict.fromkeys(("float8_e5m2", "float8_e4m3fn"), 18),
    },
    others={7: "text", 18: "complex128", 20: "a resource", 21: "a variant"},
    fixed=frozenset({"float32", "float64", "complex64", "float8_e5m2", "float8_e4m3fn"}),
    fills=True,
)
ONNX = Layout(
    dtypes={
        1: "float32",
        2: "uint8",
        3: "int8",
        4: "uint16",
        5: "int16",
        6: "int32",
        7: "int64",
        9: "bool",
        10: "float16",
        11: "float64",
        12: "uint32",
        13: "uint64",
        14: "complex64",
        16: "bfloat16",
        17: "float8_e4m3fn",
        19: "float8_e5m2",
    },
    raw=9,
    packed={
        **{"float32": 4, "complex64": 4, "int64": 7, "float64": 10, "uint32": 11, "uint64": 11},
        **dict.fromkeys(("int32", "int16", "int8", "uint16", "uint8", "bool", "float16", "bfloat16"), 5),
        **dict.fromkeys(("float8_e5m2", "float8_e4m3fn"), 5),
    },
    others={
        **{8: "text", 15: "complex128", 18: "float8_e4m3fnuz", 20: "float8_e5m2fnuz", 21: "uint4", 22: "int4"},
        **{23: "float4_e2m1", 24: "float8_e8m0", 25: "uint2", 26: "int2"},
    },
)


def check_shape(dims: Sequence[int]) -> tuple[int, ...]:
    """`dims` if a tensor could have them."""
    if len(dims) > MAX_RANK or min(dims, default=0) < 0 or math.prod(d or 1 for d in dims) >> 63:
        raise Malformed(f"its shape is absurd, of rank {len(dims)}: {tuple(dims[:MAX_RANK])}")
    return tuple(dims)


def tensorflow_shape(shape: Message) -> tuple[int, ...]:
    """The dimensions of a TensorShapeProto."""
    if shape.integer(3):
        raise Malformed("its shape is absurd, of unknown rank")
    return check_shape([dim.integer(1) for dim in shape.messages(2)])


def lazy_tensor(proto: Message, spec: TensorSpec, layout: Layout, source: SourceFile) -> LazyTensor:
    """The tensor in a TensorProto of `source`. Raises Malformed where the proto does not fit `spec`."""
    return LazyTensor(spec, partial(_read, read_numbers(proto, spec, layout), source, spec.name))


def _read(numbers: Callable[[], memoryview], source: SourceFile, name: str) -> memoryview:
    with blame(source, name):
        return numbers()


def read_numbers(proto: Message, spec: TensorSpec, layout: Layout) -> Callable[[], memoryview]:
    """The way to the bytes of a tensor; it raises Malformed, as this does, where the proto does not fit `spec`."""
    raw = proto.parts(layout.raw)
    if raw and (len(raw[-1]) or not layout.fills):
        if len(raw[-1]) != spec.nbytes:
            raise Malformed(f"its {len(raw[-1])} bytes are not a {spec.dtype} tensor of shape {spec.shape}")
        return partial(_copy, raw[-1])
    parts = proto.parts(layout.packed[spec.dtype])
    stored = sum(map(len, parts))
    if spec.nbytes > max(MAX_FILLED, 8 * stored):
        raise Malformed(f"{stored} bytes are too few for a {spec.dtype} tensor of shape {spec.shape}")
    return partial(_unpack, parts, spec, layout)


def _copy(part: memoryview | Span) -> memoryview:
    return part.read() if isinstance(part, Span) else memoryview(bytearray(part))


def _unpack(parts: list[memoryview | Span], spec: TensorSpec, layout: Layout) -> memoryview:
    import numpy as np

    size = DTYPES[spec.dtype][1]
    views = [part.read() if isinstance(part, Span) else part for part in parts]
    raw = views[0] if len(views) == 1 else memoryview(b"".join(views))
    if spec.dtype not in layout.fixed:
        values = varints(raw).astype(f"u{size}")  # keeps the lowest bytes
    elif len(raw) % size:
        raise Malformed(f"its {len(raw)} bytes are no {spec.dtype} numbers")
    else:
        values = np.frombuffer(raw, f"V{size}")
    if len(values) > spec.numel or (len(values) < spec.numel and not layout.fills):
        raise Malformed(f"its {len(values)} numbers are not a tensor of shape {spec.shape}")
    whole = np.zeros(spec.numel, values.dtype)
    whole[: len(values)] = values
    if len(values):
        whole[len(values) :] = values[-1]
    return whole.view(np.uint8).data if spec.numel else memoryview(bytearray())
