"""NumPy archives: the `.npz` in which JAX code publishes weights, one array a member.

A zip of `NAME.npy`, stored or deflated. A member is `\\x93NUMPY`, a version, the length of a header, the header
(`{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }`) and the elements. NumPy has no bfloat16 and writes it
as two bytes of nothing (`|V2`). Arrays of Python objects would be pickles, and are not read.
"""

from __future__ import annotations

import math
import re
import zipfile
import zlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from isal.isal_zlib import crc32

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.jax.trees import arrange
from converters.readers.zip_archive import ZipArchive
from converters.tensors import LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "NumPy archive"
MAGIC = b"\x93NUMPY"
HEADER = re.compile(
    rb" ?\{ ?'descr' ?: ?'([<>|=]?[a-zA-Z][0-9]+)' ?, ?'fortran_order' ?: ?(True|False) ?, ?"
    rb"'shape' ?: ?\(([0-9L, ]*)\) ?,? ?\} *\n?"
)
SIZE = re.compile(rb" *([0-9]{1,19})L? *")
OBJECTS, RECORDS = re.compile(rb" ?\{ ?'descr' ?: ?'\|?O"), re.compile(rb" ?\{ ?'descr' ?: ?\[")
DTYPES = {
    **{f"f{size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"{kind}{size}": f"{name}{8 * size}" for kind, name in (("i", "int"), ("u", "uint")) for size in (1, 2, 4, 8)},
    **{"b1": "bool", "c8": "complex64", "V2": "bfloat16"},
}
MAX_HEADER = 1 << 14
MAX_RANK = 64
MOST_DEFLATED = 1032  # times that deflate can make anything smaller
PIECE = 1 << 20
AGAIN = "fetch it again"


@dataclass(frozen=True)
class _Member:
    """An array's place in the archive."""

    name: str
    start: int  # in the file
    packed: int
    size: int  # when inflated
    crc: int
    is_deflated: bool


@dataclass(frozen=True)
class _Layout:
    spec: TensorSpec
    at: int  # where the elements begin in the member
    is_fortran: bool
    is_big_endian: bool


def accepts(path: Path, head: bytes) -> bool:
    """Whether this is a zip of nothing but arrays, or one array."""
    if head.startswith(MAGIC):
        return True
    if not head.startswith(b"PK\x03\x04"):
        return False
    try:
        members = ZipArchive.open(SourceFile(path)).members
    except CheckpointError:
        return False
    return bool(members) and all(name.endswith(".npy") for name in members)


def read(path: Path) -> Contents:
    """Every array by its name; see `readers.jax.trees` for what is taken off."""
    source = SourceFile(path)
    if source.size >= len(MAGIC) and bytes(source.read(0, len(MAGIC))) == MAGIC:
        problem, cure = "is one array without a name, not a state dict", "save all arrays by name with numpy.savez"
        raise CheckpointError(problem, file=path, cure=cure)
    archive = ZipArchive.open(source)
    leaves = {name.removesuffix(".npy"): _open(archive, name) for name in archive.members}
    if len(leaves) < len(archive.members):
        raise UnsafeCheckpoint("two of its arrays have one name", file=path, cure=AGAIN)
    refusal = next(((name, leaf) for name, leaf in leaves.items() if isinstance(leaf, str)), None)
    if refusal and not any(isinstance(leaf, LazyTensor) for leaf in leaves.values()):
        name, words = refusal
        cure = "save every array by its name with numpy.savez"
        raise CheckpointError(words.removeprefix("left out: "), file=path, tensor=name, cure=cure)
    found = arrange(leaves)
    kinds = Counter(leaf.spec.dtype for leaf in leaves.values() if isinstance(leaf, LazyTensor))
    note = f"two bytes of unnamed type are read as bfloat16 in {kinds['bfloat16']} arrays"
    return Contents(
        tree=found.tree,
        files=(source,),
        integrity="CRC-32 of every array",
        wrappers=found.wrappers,
        set_aside=found.set_aside,
        notes=(note,) if kinds["bfloat16"] else (),
    )


def _open(archive: ZipArchive, member: str) -> LazyTensor | str:
    """An array, unread; a sentence where it holds no numbers that are known here."""
    name, file = member.removesuffix(".npy"), archive.file
    info, start = archive.locate(member, name)
    is_deflated = info.compress_type == zipfile.ZIP_DEFLATED
    place = _Member(name, start, info.compress_size, info.file_size, info.CRC, is_deflated)
    if place.size > MOST_DEFLATED * (place.packed + 1):
        raise UnsafeCheckpoint(f"{place.packed} bytes do not inflate to {place.size}", file=file.path, tensor=name)
    layout = _layout(_head(archive, place), place, file.path)
    if isinstance(layout, str):
        return layout
    return LazyTensor(layout.spec, partial(_read, archive, place, layout))


def _layout(head: bytes, place: _Member, path: Path) -> _Layout | str:
    fault = partial(DamagedCheckpoint, file=path, tensor=place.name)
    if head[: len(MAGIC)] != MAGIC or head[6:7] not in (b"\1", b"\2", b"\3"):
        raise fault("is no array")
    at = 10 if head[6] == 1 else 12
    end = at + int.from_bytes(head[8:at], "little")
    header = HEADER.fullmatch(head, at, end) if end <= len(head) else None
    if header is None:
        if OBJECTS.match(head, at):
            return "left out: it holds Python objects, which only unpickling could read"
        if RECORDS.match(head, at):
            return "left out: it holds records"
        raise fault(f"its header is not an array's: {printable(head[at:end].decode('latin-1'), 80)}")
    descr = header[1].decode()
    sizes = [SIZE.fullmatch(size) for size in header[3].removesuffix(b" ").removesuffix(b",").split(b",") if header[3]]
    if not all(sizes) or len(sizes) > MAX_RANK:
        raise fault(f"its shape makes no sense: {printable(header[3].decode(), 80)}")
    shape = tuple(int(size[1]) for size in sizes if size)
    dtype = DTYPES.get(descr.lstrip("<>|="))
    if dtype is None:
        return f"left out: its elements are {printable(descr)}"
    spec = TensorSpec(place.name, shape, dtype)
    if math.prod(size or 1 for size in shape) >> 63 or spec.nbytes != place.size - end:
        raise fault(f"has {place.size - end} bytes, but shape {shape} of {dtype} takes another number")
    return _Layout(spec, end, header[2] == b"True", descr.startswith(">"))


def _head(archive: ZipArchive, place: _Member) -> bytes:
    """The member's first bytes."""
    if not place.is_deflated:
        return bytes(archive.file.read(place.start, min(MAX_HEADER, place.size), place.name))
    packed = archive.file.read(place.start, min(MAX_HEADER, place.packed), place.name)
    try:
        return zlib.decompressobj(-15).decompress(packed, MAX_HEADER)
    except zlib.error as error:
        raise DamagedCheckpoint("does not inflate", file=archive.file.path, tensor=place.name, cure=AGAIN) from error


def _read(archive: ZipArchive, place: _Member, layout: _Layout) -> memoryview:
    whole = _inflate(archive, place) if place.is_deflated else archive.file.read(place.start, place.size, place.name)
    if crc32(whole) != place.crc:
        raise DamagedCheckpoint("its CRC-32 differs", file=archive.file.path, tensor=place.name, cure=AGAIN)
    raw, spec = whole[layout.at :], layout.spec
    if not (layout.is_fortran or layout.is_big_endian):
        return raw
    import numpy as np

    size = len(raw) // max(spec.numel, 1)
    width = size // 2 if spec.dtype.startswith("complex") else size
    if layout.is_big_endian and size:
        raw = np.frombuffer(raw, f">u{width}").astype(f"<u{width}").view(np.uint8).data
    if layout.is_fortran and spec.numel:
        array = np.frombuffer(raw, f"V{size}").reshape(spec.shape[::-1]).T
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
    return raw


def _inflate(archive: ZipArchive, place: _Member) -> memoryview:
    inflater, out = zlib.decompressobj(-15), bytearray()
    try:
        for at in range(0, place.packed, PIECE):
            piece = archive.file.read(place.start + at, min(PIECE, place.packed - at), place.name)
            out += inflater.decompress(piece, place.size + 1 - len(out))
            if len(out) > place.size:
                break
    except zlib.error as error:
        raise DamagedCheckpoint("does not inflate", file=archive.file.path, tensor=place.name, cure=AGAIN) from error
    if len(out) != place.size:
        raise DamagedCheckpoint(
            f"inflates to {len(out)} bytes, not {place.size}", file=archive.file.path, tensor=place.name, cure=AGAIN
        )
    return memoryview(out)
