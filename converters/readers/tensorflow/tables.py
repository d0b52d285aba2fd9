"""TensorFlow's first checkpoint format: one sorted table, or several, of the tensors themselves.

    ""          -> 1 meta: 1 tensor (1 name, 2 shape, 3 dtype, 4 slice), 2 version (1 producer)
    slice's key -> 2 data: 1 name, 2 slice, 3 TensorProto without dtype and shape

These are the fields of SavedTensorSlices (tensorflow/core/util/saved_tensor_slice.proto). A variable that was not
partitioned is one slice. Each of several tables has a meta of what it holds, and a tensor's slices may be in several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.files import SourceFile
from converters.readers.protobuf import Malformed, Message, blame
from converters.readers.tensor_protos import TENSORFLOW, read_numbers, tensorflow_shape
from converters.readers.tensorflow.slices import Box, check_cover, join, read_slice
from converters.readers.tensorflow.sstable import Table
from converters.tensors import LazyTensor, TensorSpec

__all__ = ["Tables", "open_tables"]

LAYOUT = replace(TENSORFLOW, fills=False)
MAX_SLICES = 1 << 17
MAX_NAME = 1 << 12  # bytes; every slice's key holds it
MOST_GROWTH = 32 * 8  # times: snappy's 32, and 8 bytes from one of a packed number


@dataclass(frozen=True)
class Tables:
    files: tuple[SourceFile, ...]
    tensors: dict[str, LazyTensor | str]  # a sentence where it holds no numbers
    producer: int  # version of the format


@dataclass
class _Tensor:
    file: SourceFile  # the first that lists it
    shape: tuple[int, ...]
    dtype: int
    slices: list[tuple[Box, Table, bytes]] = field(default_factory=list)  # place, and where its bytes are


def open_tables(paths: Sequence[Path]) -> Tables:
    """What the tables at `paths` hold together; no tensor's bytes are read. Raises CheckpointError."""
    found: dict[str, _Tensor] = {}
    files = tuple(SourceFile(path) for path in paths)
    producer = count = 0
    for file in files:
        table = Table(file)
        meta = _meta(table)
        with blame(file):
            producer = meta.message(2).integer(1)
            for saved in meta.messages(1):
                count += 1 + _add(saved, table, found)
                if count > MAX_SLICES:
                    raise UnsafeCheckpoint(f"lists more than {MAX_SLICES} slices", file=file.path)
    room = MOST_GROWTH * sum(file.size for file in files)
    return Tables(files, {name: _open(name, tensor, room) for name, tensor in found.items()}, producer)


def _meta(table: Table) -> Message:
    with blame(table.file):
        first = table.get(b"")
        saved = Message(b"" if first is None else first)
        if saved.is_bytes(1):
            return saved.message(1)
    raise CheckpointError(
        "is a table, but not a checkpoint",
        file=table.file.path,
        cure="if it is a bundle's index, call it PREFIX.index beside PREFIX.data-00000-of-00001",
    )


def _add(saved: Message, table: Table, found: dict[str, _Tensor]) -> int:
    """Enter a SavedSliceMeta; the number of its slices."""
    name = saved.text(1)
    if len(name) > MAX_NAME:
        raise UnsafeCheckpoint(f"a name has {len(name)} characters", file=table.file.path, tensor=name)
    with blame(table.file, name):
        shape, dtype = tensorflow_shape(saved.message(2)), saved.integer(3)
        tensor = found.setdefault(name, _Tensor(table.file, shape, dtype))
        if (tensor.shape, tensor.dtype) != (shape, dtype):
            raise Malformed("has another shape or dtype in another file")
        parts = saved.parts(4)
        for part in parts:
            box, key = read_slice(Message(part), name, shape)
            tensor.slices.append((box, table, key))
    return len(parts)


def _open(name: str, tensor: _Tensor, room: int) -> LazyTensor | str:
    if tensor.dtype not in TENSORFLOW.dtypes:
        return TENSORFLOW.refusal(tensor.dtype)
    spec = TensorSpec(name, tensor.shape, TENSORFLOW.dtypes[tensor.dtype])
    with blame(tensor.file, name):
        if spec.nbytes > room:
            raise Malformed(f"its shape {spec.shape} takes more than all tables can hold")
        check_cover(spec.shape, [box for box, _, _ in tensor.slices])
    pieces = [(box, partial(_read, _part(spec, box), table, key)) for box, table, key in tensor.slices]
    return LazyTensor(spec, pieces[0][1] if len(pieces) == 1 else partial(join, spec, pieces))


def _part(spec: TensorSpec, box: Box) -> TensorSpec:
    return replace(spec, shape=tuple(length for _, length in box))


def _read(spec: TensorSpec, table: Table, key: bytes) -> memoryview:
    """The bytes of a slice, whose shape `spec` has."""
    fault = partial(DamagedCheckpoint, file=table.file.path, tensor=spec.name, cure="fetch it again")
    value = table.get(key)
    if value is None:
        raise fault("is listed, but not there")
    try:
        return read_numbers(Message(value).message(2).message(3), spec, LAYOUT)()
    except Malformed as error:
        raise fault(str(error)) from error
