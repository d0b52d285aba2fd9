"""torch.export archives (`.pt2`): a zip in which JSON tells where each weight of a program lies.

`data/weights/MODEL_weights_config.json` gives the place, dtype, shape and strides of parameters and buffers;
several programs may be in one archive. Archives of older torch hold `serialized_state_dict.pt` instead,
which is a file of torch.save. The program itself is not looked at.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers import Contents
from converters.readers.files import SourceFile, Window
from converters.readers.pickles import Opaque, Symbol
from converters.readers.strict_json import parse_json
from converters.readers.torch.storages import Storage, View
from converters.readers.torch.trees import build_tree, open_tensor
from converters.readers.torch.zip_file import INTEGRITY, Pickled, check_byte_order
from converters.readers.zip_archive import AGAIN, ZipArchive
from converters.tensors import DTYPES, LazyTensor

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "torch.export archive"
CONFIG = re.compile(r"(.*?)data/weights/(.+)_weights_config\.json", re.DOTALL)
OLDER = "serialized_state_dict.pt"
MAX_CONFIG = 64 << 20  # bytes
SCALARS = {  # the numbers that torch.export gives to dtypes
    **{1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64"},
    **{10: "complex64", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2"},
    **{34: "uint32", 35: "uint64"},
}


def accepts(path: Path, head: bytes) -> bool:
    if not head.startswith(b"PK\x03\x04"):
        return False
    try:
        members = ZipArchive.open(SourceFile(path)).members
    except CheckpointError:
        return False
    return OLDER in members or any(map(CONFIG.fullmatch, members))


def read(path: Path) -> Contents:
    file = SourceFile(path)
    archive = ZipArchive.open(file)
    if OLDER in archive.members:
        place = archive.record(OLDER)
        inner = Pickled(ZipArchive.open(Window(file, place.offset, place.nbytes)))
        return Contents(build_tree(inner.value, path, open_tensor(inner.find)), (file,), inner.integrity)
    programs = {}
    for found in filter(None, map(CONFIG.fullmatch, archive.members)):
        check_byte_order(archive, found[1])
        config = parse_json(bytes(archive.content(found[0], MAX_CONFIG)), path, "its weights_config.json")
        try:
            programs[found[2]] = {
                name: _open(archive, f"{found[1]}data/weights/", name, entry)
                for name, entry in config["config"].items()
            }
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            problem = "its weights_config.json makes no sense"
            raise DamagedCheckpoint(problem, file=path, cure=AGAIN) from error
    return Contents(programs if len(programs) > 1 else next(iter(programs.values())), (file,), INTEGRITY)


def _open(archive: ZipArchive, folder: str, name: str, entry: dict[str, Any]) -> LazyTensor | Opaque:
    """The tensor of one entry; raises TypeError and its like for what makes no sense."""
    meta, path = entry["tensor_meta"], entry["path_name"]
    if entry["use_pickle"]:
        return Opaque(Symbol("torch", "Tensor"), "is pickled in the archive: no plain tensor")
    if (dtype := SCALARS.get(meta["dtype"])) is None:
        return Opaque(Symbol("torch", "Tensor"), f"is of dtype {int(meta['dtype'])}, which is not converted")
    record = archive.record(f"{folder}{path}", name)
    itemsize = DTYPES[dtype][1]
    numel = record.nbytes // itemsize
    storage = Storage(path, dtype, itemsize, numel, (0, numel))
    offset, shape, strides = (meta[key] for key in ("storage_offset", "sizes", "strides"))
    sizes = (tuple(size["as_int"] for size in sizes) for sizes in (shape, strides))
    return View(storage, dtype, offset["as_int"], *sizes).open(name, record)
