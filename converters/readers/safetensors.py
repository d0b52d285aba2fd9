"""Safetensors files: 8 bytes of header length, a JSON header, then every tensor's bytes without a gap.

The header gives dtype, shape and data_offsets by name; `__metadata__` holds strings. The format has no
checksum.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.strict_json import parse_json
from converters.tensors import DTYPES, LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "safetensors"
SHARD = re.compile(r".+-(\d{5})-of-(\d{5})\.safetensors")
MAX_HEADER = 100_000_000  # bytes, as the library has it
NAMES = {code: name for name, (code, _) in DTYPES.items()}


def accepts(path: Path, head: bytes) -> bool:
    """Whether the first 8 bytes are a length, not text, and a JSON object follows."""
    return len(head) > 8 and head[7] == 0 and head[8:9] == b"{"


def read(path: Path) -> Contents:
    source = SourceFile(path)
    shard = SHARD.fullmatch(path.name)
    note = f"this is shard {int(shard[1])} of {int(shard[2])}; the path of their folder gives them all" if shard else ""
    return Contents(_open_shard(source), (source,), "none in format", notes=(note,) if note else ())


def _open_shard(source: SourceFile) -> dict[str, Any]:
    """One file's lazy tensors by name, and its `__metadata__`."""
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_HEADER:
        raise UnsafeCheckpoint(f"its header takes {length:,} bytes", file=source.path)
    header = parse_json(bytes(source.read(8, length)), source.path, "its header")
    tree: dict[str, Any] = {}
    if "__metadata__" in header:
        tree["__metadata__"] = metadata = header.pop("__metadata__")
        if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
            raise DamagedCheckpoint("its __metadata__ holds more than strings", file=source.path)
    ranges = []
    for name, entry in header.items():
        spec, begin, end = _check(name, entry, source.path)
        place = 8 + length + begin, end - begin, name
        tree[name] = LazyTensor(spec, partial(source.read, *place), partial(source.copy, *place))
        ranges.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(ranges):
        if begin != at:
            kind = "overlaps another tensor" if begin < at else "leaves a gap before it"
            raise DamagedCheckpoint(kind, file=source.path, tensor=name, cure="fetch it again")
        at = end
    if 8 + length + at != source.size:
        problem = f"takes {source.size} bytes, not {8 + length + at}"
        raise DamagedCheckpoint(problem, file=source.path, cure="is the download complete?")
    return tree


def _check(name: str, entry: Any, path: Path) -> tuple[TensorSpec, int, int]:
    """A header's entry as a spec and a range of bytes."""
    fault = partial(DamagedCheckpoint, file=path, tensor=name)
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise fault("its header is not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in NAMES:
        raise CheckpointError(f"is of dtype {printable(str(dtype))}, which is not converted", file=path, tensor=name)
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise fault("its shape or data_offsets make no sense")
    spec = TensorSpec(name, tuple(shape), NAMES[dtype])
    begin, end = offsets
    if end - begin != spec.nbytes:
        raise fault(f"has {end - begin} bytes, but shape {spec.shape} of {spec.dtype} takes {spec.nbytes}")
    return spec, begin, end


def _are_sizes(values: Any) -> bool:
    """Whether these are at most 64 integers that 63 bits can hold."""
    return (
        isinstance(values, list)
        and len(values) <= 64
        and all(type(value) is int and 0 <= value < 1 << 63 for value in values)
    )
