"""Flax's serialized states: MessagePack maps within maps, whose leaves are arrays.

    array: extension 1: [shape, dtype's name, bytes]      scalar of NumPy: extension 3, of the same content
    array of more than 1 GiB: {"__msgpack_chunked_array__": true, "shape": {"0": 3, ...}, "chunks": {"0": array, ...}}

Only heads are read (github.com/msgpack/msgpack/blob/master/spec.md), and of arrays the place is kept. Names are the
maps' keys, joined by slashes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.jax.trees import arrange
from converters.readers.protobuf import Malformed, ReadAhead, blame
from converters.readers.tensor_protos import check_shape
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "Flax msgpack"
ARRAY, SCALAR = 1, 3  # extensions
CHUNKED = "__msgpack_chunked_array__"
MAX_DEPTH = 64
MAX_ITEMS = 1 << 17
MAX_TEXT = 1 << 11  # bytes of a text, and characters of a name
SIZED = {  # first byte: kind, bytes of its length
    **{0xC4: ("bytes", 1), 0xC5: ("bytes", 2), 0xC6: ("bytes", 4)},
    **{0xC7: ("extension", 1), 0xC8: ("extension", 2), 0xC9: ("extension", 4)},
    **{0xD9: ("text", 1), 0xDA: ("text", 2), 0xDB: ("text", 4)},
    **{0xDC: ("list", 2), 0xDD: ("list", 4), 0xDE: ("map", 2), 0xDF: ("map", 4)},
}
NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q"}
NUMBERS |= {0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


@dataclass(frozen=True, slots=True)
class _Array:
    """The place of an array's bytes, in one piece or several."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[tuple[int, int], ...]  # offset, size


def accepts(path: Path, head: bytes) -> bool:
    """Whether this begins as a map whose first key is a name."""
    if not head or not (0x81 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return False
    at = 1 + (SIZED[head[0]][1] if head[0] in SIZED else 0)
    mark = head[at : at + 1]
    if mark == b"\xd9":
        length, at = head[at + 1] if at + 1 < len(head) else 0, at + 2
    else:
        length, at = (mark[0] & 31 if mark and mark[0] >> 5 == 5 else 0), at + 1
    return 0 < length == len(head[at : at + length]) and head[at : at + length].decode("latin-1").isprintable()


def read(path: Path) -> Contents:
    """Every array; see `trees` for what is taken off."""
    source = SourceFile(path)
    scan = _Scan(source)
    with blame(source):
        root, end = scan.value(0, "", 0)
    if end != source.size:
        raise DamagedCheckpoint(f"goes on for {source.size - end} bytes after its end", file=path)
    if not isinstance(root, dict):
        raise CheckpointError("holds no names, only one value", file=path, cure="save the whole state dict")
    leaves: dict[str, Any] = {}
    for name, leaf in _flatten(root, "", source):
        if name in leaves:
            raise DamagedCheckpoint("is the name of two values", file=path, tensor=name)
        leaves[name] = leaf
    found = arrange(leaves)
    return Contents(found.tree, (source,), "none in format", wrappers=found.wrappers, set_aside=found.set_aside)


class _Scan:
    """A walk over the heads in a file."""

    def __init__(self, source: SourceFile) -> None:
        self.source, self.file, self.items = source, ReadAhead(source), 0

    def take(self, at: int, size: int) -> memoryview:
        if at + size > self.source.size:
            raise Malformed(f"ends in the midst of {size} bytes at byte {at}; is the download complete?")
        return self.file.view(at, size)

    def head(self, at: int) -> tuple[str, Any, int]:
        """A kind, how many items or bytes there are of it (or the value itself), and where they begin."""
        first, at = self.take(at, 1)[0], at + 1
        if first in SIZED:
            kind, width = SIZED[first]
            return kind, int.from_bytes(self.take(at, width), "big"), at + width
        if first in NUMBERS:
            width = struct.calcsize(NUMBERS[first])
            return "value", struct.unpack(NUMBERS[first], self.take(at, width))[0], at + width
        if first in CONSTANTS:
            return "value", CONSTANTS[first], at
        if 0xD4 <= first <= 0xD8:
            return "extension", 1 << first - 0xD4, at
        if first < 0x80 or first >= 0xE0:
            return "value", first - 256 * (first >= 0xE0), at
        if first == 0xC1:
            raise Malformed(f"byte {at - 1} begins nothing")
        kind, bits = ("map", 4) if first < 0x90 else ("list", 4) if first < 0xA0 else ("text", 5)
        return kind, first & (1 << bits) - 1, at

    def value(self, at: int, name: str, depth: int) -> tuple[Any, int]:
        """A value and where it ends; maps and lists are dicts, arrays are their places."""
        self.items += 1
        if depth > MAX_DEPTH or self.items > MAX_ITEMS or len(name) > MAX_TEXT:
            raise UnsafeCheckpoint(
                f"holds more than {MAX_ITEMS} values, or nests them too deeply", file=self.source.path
            )
        with blame(self.source, name or None):
            kind, size, at = self.head(at)
            if kind in ("map", "list"):
                return self.container(kind, size, at, name, depth)
            if kind == "text":
                return self.text(at, size), at + size
            if kind == "extension":
                return self.extension(at, size), at + 1 + size
            if kind == "bytes":
                self.take(at + size, 0)
                return f"left out: {size} bytes of no known type", at + size
        return size, at

    def container(self, kind: str, size: int, at: int, name: str, depth: int) -> tuple[Any, int]:
        found: dict[str, Any] = {}
        for number in range(size):
            key = str(number)
            if kind == "map":
                what, length, at = self.head(at)
                if what == "text":
                    key, at = self.text(at, length), at + length
                elif type(length) is int and what == "value":
                    key = str(length)
                else:
                    raise Malformed(f"a key is no name but a {what}")
            if key in found:
                raise Malformed(f"has two values called {key!r:.80}")
            found[key], at = self.value(at, f"{name}/{key}" if name else key, depth + 1)
        return (_unite(found) if CHUNKED in found else found), at

    def text(self, at: int, size: int) -> str:
        if size > MAX_TEXT:
            raise Malformed(f"a text takes {size} bytes")
        try:
            return str(self.take(at, size), "utf-8")
        except UnicodeDecodeError as error:
            raise Malformed("a text is not UTF-8") from error

    def extension(self, at: int, size: int) -> _Array | str:
        """An array or a scalar, or a sentence."""
        kind, end = self.take(at, 1)[0], at + 1 + size
        self.take(end, 0)
        if kind not in (ARRAY, SCALAR):
            return f"left out: an extension of type {kind}"
        what, count, at = self.head(at + 1)
        if (what, count) != ("list", 3):
            raise Malformed("its array is not shape, dtype and bytes")
        what, rank, at = self.head(at)
        shape = []
        for _ in range(rank if what == "list" and rank <= MAX_DEPTH else 0):
            _, length, at = self.head(at)
            shape.append(length)
        if len(shape) != rank or not all(type(length) is int for length in shape):
            raise Malformed("its shape makes no sense")
        what, length, at = self.head(at)
        dtype, at = self.text(at, length) if what in ("text", "bytes") else "", at + length
        what, length, at = self.head(at)
        if what != "bytes" or at + length != end:
            raise Malformed("its array is not shape, dtype and bytes")
        array = _Array(check_shape(shape), dtype, ((at, length),))
        return array if dtype not in DTYPES else _checked(array)


def _unite(chunked: dict[str, Any]) -> _Array | str:
    """An array that was cut into pieces of one axis."""
    shape, chunks = chunked.get("shape"), chunked.get("chunks")
    if not isinstance(shape, dict) or not isinstance(chunks, dict) or not chunks:
        raise Malformed("its chunks are not shape and chunks")
    arrays = [chunks.get(str(number)) for number in range(len(chunks))]
    sizes = [size for number in range(len(shape)) if type(size := shape.get(str(number))) is int]
    found = [array for array in arrays if isinstance(array, _Array)]
    if len(found) < len(arrays) or len(sizes) < len(shape) or len({array.dtype for array in found}) > 1:
        raise Malformed("its chunks do not belong together")
    whole = _Array(check_shape(sizes), found[0].dtype, tuple(piece for array in found for piece in array.pieces))
    return whole if whole.dtype not in DTYPES else _checked(whole)


def _checked(array: _Array) -> _Array:
    spec, stored = TensorSpec("", array.shape, array.dtype), sum(size for _, size in array.pieces)
    if stored != spec.nbytes:
        raise Malformed(f"has {stored} bytes, but shape {spec.shape} of {spec.dtype} takes {spec.nbytes}")
    return array


def _flatten(node: dict[str, Any], prefix: str, source: SourceFile) -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _flatten(value, f"{name}/", source)
        elif not isinstance(value, _Array):
            yield name, value
        elif value.dtype not in DTYPES:
            yield name, f"left out: it holds {printable(value.dtype, 40)}"
        else:
            spec = TensorSpec(name, value.shape, value.dtype)
            yield name, LazyTensor(spec, partial(_read, source, value, name))


def _read(source: SourceFile, array: _Array, name: str) -> memoryview:
    if len(array.pieces) == 1:
        return source.read(*array.pieces[0], name)
    whole, at = memoryview(bytearray(sum(size for _, size in array.pieces))), 0
    for offset, size in array.pieces:
        whole[at : at + size] = source.read(offset, size, name)
        at += size
    return whole
