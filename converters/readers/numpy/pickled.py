"""Pickles of numpy arrays: Detectron2's `.pkl` and PaddlePaddle's `.pdparams`.

A dict of arrays by name, or such a dict below a name. An array is a call that numpy's own pickling would make,
with its shape, dtype and bytes; the bytes are read where they lie in the file. Protocol 2, which has no bytes,
spells them as UTF-8 text of Latin-1. Nothing detects damage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, printable
from converters.readers import Contents, pickles
from converters.readers.files import SourceFile
from converters.readers.pickles import Blob, Opaque, Symbol
from converters.readers.streams import FileStream
from converters.readers.torch.storages import are_sizes, gather
from converters.readers.torch.symbols import MEANINGS
from converters.readers.torch.trees import build_tree
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "pickle of numpy arrays"
PADDLE_NAMES = "StructuredToParameterName@@"
PADDLE_SPLIT = "UnpackBigParamInfor@@"
NDARRAY = Symbol("numpy", "ndarray")
NUMPY = tuple(f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric"))
KINDS = {"f": "float", "i": "int", "u": "uint", "c": "complex"}
NAMES = {"b1": "bool"} | {f"{kind}{size}": f"{name}{8 * size}" for kind, name in KINDS.items() for size in (1, 2, 4, 8)}
REFUSED = {"O": "Python objects", "V": "structures", "S": "text", "U": "text", "M": "dates", "m": "times"}


def accepts(path: Path, head: bytes) -> bool:
    """Whether this is a pickle of protocol 2 to 5; torch's own files are taken before."""
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")


def read(path: Path) -> Contents:
    file = SourceFile(path)
    stream = FileStream(file, pickles.MAX_BYTES)
    value = pickles.load(stream, path, MEANINGS, _resolve, stream.skip)
    if stream.read(1):
        raise DamagedCheckpoint("bytes follow its pickle", file=path, cure="fetch it again")
    keys = value.keys() if isinstance(value, dict) else ()
    if PADDLE_SPLIT in keys:
        raise CheckpointError("splits its large arrays", file=path, cure="save it with paddle.save(..., protocol=4)")
    is_paddle = PADDLE_NAMES in keys
    tree = build_tree(value, path, partial(_open_leaf, file, is_paddle))
    return Contents(tree, (file,), "none in format", "PaddlePaddle" if is_paddle else None)


def _resolve(name: Any) -> Any:
    raise ValueError("a persistent id, which only torch.save gives a meaning")


def _open_leaf(file: SourceFile, is_paddle: bool, value: Any, name: str) -> Any:
    """The lazy tensor of an array, the number of a numpy scalar; None for anything else."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):  # Paddle's tensor below a dict
        value, is_paddle = value[1], True
    if not isinstance(value, Opaque) or value.symbol.module not in NUMPY:
        return None
    try:
        match value.symbol.name:
            case "_reconstruct":
                shape, dtype, is_fortran, data = value.state[-4:]
                array = _Array(file, dtype, shape, data, "F" if is_fortran else "C", kind=value.arguments[0])
                return array.open(name, is_paddle)
            case "_frombuffer":
                data, dtype, shape, order, *axes = value.arguments
                return _Array(file, dtype, shape, data, order, *axes).open(name, is_paddle)
            case "scalar":
                dtype, data = value.arguments
                return _Array(file, dtype, (), data).number(name)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        problem = "its pickled array makes no sense"
        raise DamagedCheckpoint(problem, file=file.path, tensor=name, cure="fetch it again") from error
    return None


@dataclass(frozen=True)
class _Array:
    """An array as its pickle tells of it; the methods raise TypeError and its like for what makes no sense."""

    file: SourceFile
    dtype: Any
    shape: Any
    data: Any
    order: Any = "C"  # of the data: C's, Fortran's, or "K": C's, and then transposed by the axes
    axes: Any = None
    kind: Any = NDARRAY

    def open(self, name: str, is_paddle: bool = False) -> LazyTensor | Opaque:
        dtype, why = self._dtype()
        if dtype not in DTYPES or self.kind != NDARRAY:
            return Opaque(NDARRAY, why or f"is a {self.kind}, not a plain array")
        if is_paddle and dtype == "uint16":  # Paddle has no such type; it is how numpy holds its bfloat16
            dtype = "bfloat16"
        shape, axes = self.shape, tuple(range(len(self.shape)))
        if self.order == "F":
            shape, axes = shape[::-1], axes[::-1]
        elif self.order == "K" and self.axes is not None:
            axes = tuple(self.axes)
        if not are_sizes(shape) or sorted(axes) != list(range(len(shape))):
            raise ValueError
        spec = TensorSpec(name, tuple(shape[axis] for axis in axes), dtype)
        data = self._data()
        nbytes = data.nbytes if isinstance(data, Blob) else len(data)
        least = nbytes // 2 if isinstance(data, Blob) and data.is_text else nbytes  # UTF-8 of Latin-1: one or two each
        if not least <= spec.nbytes <= nbytes:
            raise ValueError
        read = partial(_read, self.file, data, spec)
        if axes != tuple(range(len(axes))) and spec.numel:
            strides = [math.prod(shape[axis + 1 :]) for axis in axes]
            read = partial(gather, read, spec.shape, tuple(strides), DTYPES[dtype][1])
        elif isinstance(data, Blob) and not data.is_text:
            return LazyTensor(spec, read, partial(self.file.copy, data.offset, data.nbytes, name))
        return LazyTensor(spec, read)

    def number(self, name: str) -> Any:
        """The value of a numpy scalar; Opaque for one of a type that numpy itself does not have."""
        import numpy as np

        tensor = self.open(name)
        if isinstance(tensor, Opaque) or tensor.spec.dtype.startswith(("bfloat", "float8")):
            return Opaque(Symbol("numpy", "generic"))
        return np.frombuffer(tensor.read(), tensor.spec.dtype)[0].item()

    def _dtype(self) -> tuple[str, str | None]:
        """The dtype, and why the array is not converted if it is not."""
        code = self.dtype.arguments[0]
        if isinstance(code, Symbol) and code.module.split(".")[0] == "ml_dtypes":
            code = code.name
        if not isinstance(code, str) or self.dtype.symbol != Symbol("numpy", "dtype"):
            raise TypeError
        if what := REFUSED.get(code[:1]):
            return "", f"is an array of {what}"
        if self.dtype.state is not None and self.dtype.state[1] == ">":
            return "", "is big-endian; save it on a little-endian machine"
        dtype = NAMES.get(code, code)
        return dtype, None if dtype in DTYPES else f"is of dtype {printable(dtype)}, which is not converted"

    def _data(self) -> Blob | bytes | bytearray | str:
        """The data, from the call that encodes it in protocol 2."""
        data = self.data
        if isinstance(data, Opaque) and data.symbol == Symbol("_codecs", "encode") and data.arguments[1] == "latin1":
            data = data.arguments[0]
        elif isinstance(data, Opaque) and data.symbol == Symbol("builtins", "bytes"):  # none
            data = b""
        if not isinstance(data, Blob | bytes | bytearray | str):
            raise TypeError
        return data


def _read(file: SourceFile, data: Blob | bytes | bytearray | str, spec: TensorSpec) -> memoryview:
    """The bytes of an array before it is transposed; raises DamagedCheckpoint if they are not as many as they must."""
    if isinstance(data, Blob):
        raw = file.read(data.offset, data.nbytes, spec.name)
        if not data.is_text:
            return raw
        data = str(raw, "utf-8", "replace")
    try:
        found = bytearray(data.encode("latin-1") if isinstance(data, str) else data)
    except UnicodeError:
        found = bytearray()
    if len(found) != spec.nbytes:
        raise DamagedCheckpoint("its text is not that of bytes", file=file.path, tensor=spec.name)
    return memoryview(found)
