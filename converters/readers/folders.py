"""Folders: the files that an index names, which must lie beside it or below."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, UnsafeCheckpoint, printable

__all__ = ["find_beside"]


def find_beside(index: Path, name: Any) -> Path:
    """The path of the file `name`, which `index` needs, in the folder of `index` or below it.

    Names that lead elsewhere, or with a drive or a scheme in them, are refused, and links that leave the folder; the
    Hugging Face cache's own links, from `snapshots/REVISION` to `blobs`, are followed. Raises CheckpointError.
    """
    shown = printable(str(name), 80)
    if not isinstance(name, str) or {"\\", ":", "\0"} & set(name) or {"", ".", ".."} & set(name.split("/")):
        raise UnsafeCheckpoint(f"needs {shown}, which is no file beside it", file=index)
    path = index.parent / name
    if not path.exists():
        raise CheckpointError(f"needs {shown}, which is missing", file=index, cure="fetch it too, beside the others")
    if hasattr(type(path), "source_file"):  # behind a URL, where there are no links
        return path
    folder, target = Path(os.path.realpath(index.parent)), Path(os.path.realpath(path))
    blobs = [one.parent.parent / "blobs" for one in (folder, *folder.parents) if one.parent.name == "snapshots"]
    if not target.is_relative_to(folder) and target.parent not in blobs:
        raise UnsafeCheckpoint(f"needs {shown}, a link that leaves the folder", file=index, cure="copy the file there")
    return path
