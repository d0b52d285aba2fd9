"""TensorFlow's file names: which files a path stands for.

No file bears a checkpoint's name. `model.ckpt` means `model.ckpt.index` beside `model.ckpt.data-?????-of-?????`, or
in the first format a table of that name, or tables called `model.ckpt-?????-of-?????`. A file called `checkpoint`
names the latest of several in its folder.
"""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers.files import SourceFile
from converters.readers.tensorflow.sstable import is_table

__all__ = ["find_tables", "is_checkpoint", "resolve"]

DATA_FILE = re.compile(r"(.+)\.data-\d{5,}-of-\d{5,}")
BESIDE = (".index", ".meta")  # what follows a bundle's name in the names of its other files
TABLE = re.compile(r"(.+)-(\d{5}|\?{5})-of-(\d{5})")
STATE = re.compile(rb'\s*model_checkpoint_path\s*:\s*"((?:[^"\\\n]|\\.)*)"')  # text of a CheckpointState message
MAX_TABLES = 1024


def is_checkpoint(path: Path, head: bytes) -> bool:
    """Whether `path`, which begins with `head` if it is a file, stands for a checkpoint."""
    if path.is_dir():
        return _state(path / "checkpoint") is not None or any(path.glob("*.index"))
    if not path.exists():
        return _index(path).is_file() or bool(_tables_of(path))
    if DATA_FILE.fullmatch(path.name):
        return True
    if path.suffix in BESIDE and path.with_suffix(".data-00000-of-00001").is_file():
        return True  # whatever it holds, so that the error names what is wrong with it
    return bool(STATE.match(head)) or is_table(SourceFile(path))


def resolve(path: Path) -> Path:
    """The checkpoint's own path, which its files' names begin with; it may name all tables with question marks."""
    if path.is_dir():
        if (named := _state(path / "checkpoint")) is not None:
            return _latest(path / "checkpoint", named)
        match sorted(path.glob("*.index")):
            case [index]:
                return index.with_suffix("")
            case several:
                names = ", ".join(printable(index.stem) for index in several[:5])
                raise CheckpointError(f"holds {len(several)} checkpoints ({names})", file=path, cure="name one of them")
    if not path.exists():
        return path
    if match := DATA_FILE.fullmatch(path.name):
        return path.with_name(match[1])
    if path.suffix in BESIDE and (path.suffix == ".index" or _index(path.with_suffix("")).is_file()):
        return path.with_suffix("")
    return path if (named := _state(path)) is None else _latest(path, named)


def find_tables(path: Path) -> list[Path]:
    """The tables of the checkpoint at a resolved path, if it is of the first format."""
    if _index(path).is_file() or not (path.is_file() or _tables_of(path)):
        return []
    return _tables_of(path) or [path]


def _tables_of(path: Path) -> list[Path]:
    """All tables `NAME-?????-of-N` that `path` is one of, is the NAME of, or is the pattern of."""
    match = TABLE.fullmatch(path.name)
    if not match:
        first = sorted(path.parent.glob(f"{glob.escape(path.name)}-00000-of-?????"))
        match = TABLE.fullmatch(first[0].name) if first and not path.exists() else None
    if not match or not 0 < int(match[3]) <= MAX_TABLES:
        return []
    return [path.with_name(f"{match[1]}-{number:05}-of-{match[3]}") for number in range(int(match[3]))]


def _index(path: Path) -> Path:
    return path.with_name(f"{path.name}.index")


def _state(path: Path) -> bytes | None:
    """What a `checkpoint` file names as the latest, still escaped; None where `path` is no such file."""
    if not path.is_file():
        return None
    file = SourceFile(path)
    found = STATE.match(file.read(0, min(file.size, 1 << 16)))
    return bytes(found[1]) if found else None


def _latest(state: Path, named: bytes) -> Path:
    """The checkpoint that the `checkpoint` file `state` names; it may not leave the file's folder."""
    try:
        name = named.decode("unicode_escape").encode("latin-1").decode()
    except UnicodeError as error:
        raise DamagedCheckpoint("names a checkpoint by what is not UTF-8", file=state) from error
    shown, cure = f'names "{printable(name)}" as the latest', "give the path of the checkpoint itself"
    if hasattr(type(state), "source_file"):  # behind a URL, where only names are followed
        prefix, is_outside = state.parent / name, bool({"/", "\\", ":"} & set(name))
        is_there = _index(prefix).is_file()
    else:
        prefix = Path(os.path.normpath(state.parent / name))
        folder = os.path.realpath(state.parent)
        is_outside = "\0" in name or not Path(os.path.realpath(prefix.parent)).is_relative_to(folder)
        is_there = not is_outside and (os.path.isfile(f"{prefix}.index") or os.path.isfile(prefix))
    if is_outside:
        raise UnsafeCheckpoint(f"{shown}, which lies outside its folder", file=state, cure=cure)
    if not (is_there or _tables_of(prefix)):
        raise CheckpointError(f"{shown}, of which there is no index", file=state, cure=cure)
    return prefix
