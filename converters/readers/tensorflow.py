"""TensorFlow checkpoints: bundles, as `tf.compat.v1.train.Saver` and `tf.train.Checkpoint` write them.

No file bears a checkpoint's name: `model.ckpt` means `model.ckpt.index` beside `model.ckpt.data-?????-of-?????`.
`read` takes that prefix, any of those files, a folder that holds one bundle, a `checkpoint` file (which names the
latest of several in its folder) or its folder, or a SavedModel's folder, of which only the variables are opened.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers import Contents
from converters.readers.bundle import NUMBERS, STRING, Bundle, open_bundle
from converters.readers.files import SourceFile
from converters.readers.object_graph import GRAPH_KEY, name_variables
from converters.readers.protobuf import Malformed
from converters.readers.sstable import is_table

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "TensorFlow checkpoint"
DATA_FILE = re.compile(r"(.+)\.data-\d{5,}-of-\d{5,}")
STATE = re.compile(rb'\s*model_checkpoint_path\s*:\s*"((?:[^"\\\n]|\\.)*)"')  # text of a CheckpointState message
MAX_GRAPH = 1 << 22  # bytes; a thousand layers take a million
MAX_TEXT = 1 << 20  # bytes of all string tensors that are kept
LEFT_OUT = {7: "text", 18: "complex128", 20: "a resource", 21: "a variant"}


def accepts(path: Path, head: bytes) -> bool:
    if path.is_dir():
        return _state(path / "checkpoint") is not None or bool(_indexes(path))
    if not path.exists():
        return path.with_name(f"{path.name}.index").is_file()
    if DATA_FILE.fullmatch(path.name):
        return True
    if path.suffix == ".index" and path.with_suffix(".data-00000-of-00001").is_file():
        return True  # whatever it holds, so that the error names what is wrong with it
    return bool(STATE.match(head)) or is_table(SourceFile(path))


def read(path: Path) -> Contents:
    """Every variable under its own name, in one flat dict.

    Optimizers' variables have `/.OPTIMIZER_SLOT/` in their names where the checkpoint has an object graph. Small
    string tensors are plain text; types that hold no numbers are a sentence that says so.
    """
    bundle = open_bundle(_prefix(path))
    tree: dict[str, Any] = {}
    room = MAX_TEXT
    for key, name in _names(bundle).items():
        if name in tree:
            raise DamagedCheckpoint("is the name of two tensors", file=bundle.index.path, tensor=name)
        entry = bundle.entries[key]
        if entry.dtype in NUMBERS:
            tree[name] = bundle.tensor(key, name)
        elif entry.dtype == STRING and not entry.pieces and entry.size <= room:
            room -= entry.size
            texts = [str(text, "utf-8", "backslashreplace") for text in bundle.strings(key)]
            tree[name] = texts if entry.shape else texts[0]
        else:
            tree[name] = f"left out: it holds {LEFT_OUT.get(entry.dtype, f'elements of type {entry.dtype}')}"
    return Contents(
        tree=tree,
        files=(bundle.index, *bundle.shards.values()),
        integrity="CRC-32C of every tensor",
        writer=f"TensorFlow bundle (producer version {bundle.producer})",
    )


def _names(bundle: Bundle) -> dict[str, str]:
    """Key -> name of everything but the object graph itself."""
    entries = dict(bundle.entries)
    graph = entries.pop(GRAPH_KEY, None)
    if graph is None:
        return {key: key for key in entries}
    file = bundle.index.path
    if graph.size > MAX_GRAPH:
        raise UnsafeCheckpoint(f"an object graph of {graph.size} bytes is beyond reason", file=file, tensor=GRAPH_KEY)
    if (graph.dtype, graph.shape, graph.pieces) != (STRING, (), ()):
        raise DamagedCheckpoint("is not one string", file=file, tensor=GRAPH_KEY)
    try:
        return name_variables(bundle.strings(GRAPH_KEY)[0], entries)
    except Malformed as error:
        raise DamagedCheckpoint(str(error), file=file, tensor=GRAPH_KEY) from error


def _prefix(path: Path) -> Path:
    """What the names of the bundle's files begin with."""
    if path.is_dir():
        if (named := _state(path / "checkpoint")) is not None:
            return _latest(path / "checkpoint", named)
        match _indexes(path):
            case [index]:
                return index.with_suffix("")
            case several:
                names = ", ".join(printable(index.stem) for index in several[:5])
                raise CheckpointError(f"holds {len(several)} checkpoints ({names})", file=path, cure="name one of them")
    if not path.exists():
        return path
    if match := DATA_FILE.fullmatch(path.name):
        return path.with_name(match[1])
    if path.suffix == ".index":
        return path.with_suffix("")
    if (named := _state(path)) is not None:
        return _latest(path, named)
    raise CheckpointError(
        "is a table without data files: TensorFlow's first format, or an index under another name",
        file=path,
        cure="save it again with tf.compat.v1.train.Saver, or call it PREFIX.index beside its data files",
    )


def _indexes(folder: Path) -> list[Path]:
    """The index files in a folder, or else those of the SavedModel that it is."""
    return sorted(folder.glob("*.index")) or sorted(folder.glob("variables/variables.index"))


def _state(path: Path) -> bytes | None:
    """What a `checkpoint` file names as the latest, still escaped; None where `path` is no such file."""
    if not path.is_file():
        return None
    file = SourceFile(path)
    found = STATE.match(file.read(0, min(file.size, 1 << 16)))
    return bytes(found[1]) if found else None


def _latest(state: Path, named: bytes) -> Path:
    """The prefix that the `checkpoint` file `state` names; it may not leave the file's folder."""
    try:
        name = named.decode("unicode_escape").encode("latin-1").decode()
    except UnicodeError as error:
        raise DamagedCheckpoint("names a checkpoint by what is not UTF-8", file=state) from error
    prefix = Path(os.path.normpath(state.parent / name))
    shown, cure = f'names "{printable(name)}" as the latest', "give the path of the checkpoint itself"
    if "\0" in name or not Path(os.path.realpath(prefix.parent)).is_relative_to(os.path.realpath(state.parent)):
        raise UnsafeCheckpoint(f"{shown}, which lies outside its folder", file=state, cure=cure)
    if not os.path.isfile(f"{prefix}.index"):
        raise CheckpointError(f"{shown}, of which there is no index", file=state, cure=cure)
    return prefix
