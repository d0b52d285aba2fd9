"""Folders that are absent, old, or new and whole.

Everything goes to a temporary folder beside the destination, is flushed to the disk, and renamed.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.errors import OutputError, printable

__all__ = ["OUTPUT_FILES", "new_folder"]

OUTPUT_FILES = ("model.safetensors", "config.json", "conversion.json", "README.md", "verification.json")


@contextmanager
def new_folder(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that becomes `destination` when the block ends well, and vanishes when it does not.

    Raises OutputError when the destination exists and may not be replaced, or cannot be written.
    """
    _check_destination(destination, overwrite)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
        folder.chmod(0o777 & ~_umask())
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", file=destination) from error
    try:
        yield folder
        for path in folder.iterdir():
            _flush(path)
        _flush(folder)
        _rename(folder, destination)
        _flush(destination.parent)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", file=destination) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_destination(destination: Path, overwrite: bool) -> None:
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir():
        raise OutputError("is there already and is no folder", file=destination, cure="choose another name")
    present = {path.name for path in destination.iterdir()}
    if present and not overwrite:
        raise OutputError("is there already", file=destination, cure="choose another name, or pass --overwrite")
    if foreign := sorted(present - set(OUTPUT_FILES)):
        raise OutputError(
            f"holds other files too ({printable(foreign[0])})", file=destination, cure="choose another name"
        )
    if present and "conversion.json" not in present:
        raise OutputError("is not an earlier conversion", file=destination, cure="choose another name")


def _rename(folder: Path, destination: Path) -> None:
    if not destination.exists() or not any(destination.iterdir()):
        folder.rename(destination)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{destination.name}.old.", dir=destination.parent))
    try:
        destination.rename(old / destination.name)
        try:
            folder.rename(destination)
        except OSError:
            (old / destination.name).rename(destination)
            raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
