"""Readers: one module for each file format, all with the few names of the `Reader` protocol.

    a path or a URL -> a reader's tree of lazy tensors -> `wrappers` finds the state dict in it -> `Checkpoint`

`open_checkpoint` asks each module of `READERS` in turn whether it knows the first bytes; the extension is never asked.
The formats of one framework have a package. What several formats are made of lies beside it: files, records and
streams of bytes, folders, zip archives, pickles, protocol buffers, JSON; `remote` gives a URL the face of a path.
A reader lists tensors without reading their data, runs nothing that the file holds, and opens nothing but
the files it names. To add a format, write such a module and add its name to `READERS`.
"""

from __future__ import annotations

import glob
import hashlib
import os
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

from converters.errors import UnknownFormat
from converters.readers.files import SourceFile, is_url
from converters.tensors import LazyTensor, TensorSpec

__all__ = ["READERS", "Checkpoint", "Contents", "Reader", "open_checkpoint"]

READERS = (  # first to accept wins
    *("safetensors", "tensorflow.saved_model", "tensorflow.checkpoint", "keras.checkpoint", "huggingface"),
    *("torch.distributed", "torch.deepspeed", "jax.orbax", "numpy.npz", "torch.export", "torch.zip_file"),
    *("torch.legacy", "numpy.pickled", "onnx", "tensorflow.graph_def", "jax.flax"),
)


@dataclass(frozen=True)
class Contents:
    """What a reader found: a tree of dicts whose leaves are LazyTensors or plain values."""

    tree: dict[str, Any]
    files: tuple[SourceFile, ...]
    integrity: str  # how the format detects damage, e.g. "CRC-32 of every record", "none in format"
    writer: str | None = None  # who wrote it, e.g. "Keras 3.15.1"
    notes: tuple[str, ...] = ()  # what a person should know of the weights
    wrappers: tuple[str, ...] = ()  # what the reader took off the names, outermost first
    set_aside: dict[str, str] = field(default_factory=dict)  # name or pattern: why it is no weight


class Reader(Protocol):
    """The face of every module here."""

    FORMAT: str  # what a person calls it, e.g. "PyTorch zip"

    def accepts(self, path: Path, head: bytes) -> bool:
        """Whether the file at `path`, whose first 4096 bytes are `head`, is of this format."""

    def read(self, path: Path) -> Contents:
        """The file's tensors, unread. Raises CheckpointError."""


@dataclass(frozen=True)
class Checkpoint:
    """A source's state dict, and what lay around it."""

    path: Path
    format: str
    tensors: dict[str, LazyTensor]
    wrappers: tuple[str, ...] = ()  # what was taken off, outermost first: "state_dict", "module."
    set_aside: dict[str, str] = field(default_factory=dict)  # name or folded pattern: reason it is not a weight
    metadata: dict[str, Any] = field(default_factory=dict)  # plain values that lay beside the tensors
    files: tuple[SourceFile, ...] = ()
    integrity: str = "none in format"
    writer: str | None = None
    notes: tuple[str, ...] = ()  # what a person should know of the weights, e.g. that they were dequantized

    @property
    def url(self) -> str | None:
        """Where a remote source lies, without credentials and query."""
        return getattr(self.path, "url", None)

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: tensor.spec for name, tensor in self.tensors.items()}

    def sha256(self) -> str:
        """The content's SHA-256 in hex; of several files, that of the lines `<sha256>  <name>` in order of names."""
        digests = {self._name_of(file): file.sha256() for file in self.files}
        if len(digests) == 1:
            return next(iter(digests.values()))
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    def _name_of(self, file: SourceFile) -> str:
        """A file's path within the checkpoint's folder, or its name."""
        inside = self.path.is_dir() and file.path.is_relative_to(self.path)
        return file.path.relative_to(self.path).as_posix() if inside else file.path.name


def open_checkpoint(path: str | os.PathLike[str], *, key: str | None = None, ema: bool | None = None) -> Checkpoint:
    """Open whatever lies at `path`, or behind a URL, and find the state dict in it.

    `key` is the path of a nested state dict ("model", "teacher.backbone"), whose end may be what names begin
    with; `ema` asks for the averaged
    (True) or the raw weights (False) where a file holds both; by default the averaged ones are taken.
    Raises CheckpointError (one line that names the file and the tensor).
    """
    from converters.readers.wrappers import unwrap

    path = _locate(path)
    reader = _find_reader(path)
    contents = reader.read(path)
    found = unwrap(contents.tree, path, key=key, ema=ema)
    return Checkpoint(
        path=path,
        format=reader.FORMAT,
        tensors=found.tensors,
        wrappers=(*contents.wrappers, *found.wrappers),
        set_aside={**contents.set_aside, **found.set_aside},
        metadata=found.metadata,
        files=contents.files,
        integrity=contents.integrity,
        writer=contents.writer,
        notes=(*contents.notes, *found.notes, *filter(None, (getattr(path, "note", ""),))),
    )


def _locate(source: str | os.PathLike[str]) -> Path:
    """The path, or what is one to readers."""
    if hasattr(type(source), "source_file"):
        return cast(Path, source)
    if is_url(source):
        from converters.readers.remote import open_remote

        return cast(Path, open_remote(os.fspath(source)))
    return Path(source)


def _find_reader(path: Path) -> Reader:
    head = b""
    if path.is_file() or not _is_bundle_prefix(path):
        head_file = SourceFile(path)
        head = bytes(head_file.read(0, min(4096, head_file.size)))
        head_file.close()
    for name in READERS:
        reader = cast(Reader, import_module(f"converters.readers.{name}"))
        if reader.accepts(path, head):
            return reader
    raise UnknownFormat("is a folder without a checkpoint" if path.is_dir() else _what_it_is(head), file=path)


def _is_bundle_prefix(path: Path) -> bool:
    """TensorFlow names a checkpoint by the common prefix of its files; a folder may hold one."""
    tables = path.parent.glob(f"{glob.escape(path.name)}-00000-of-?????")
    return path.is_dir() or path.with_name(path.name + ".index").is_file() or any(tables)


def _what_it_is(head: bytes) -> str:
    text = head.lstrip()[:200].lower()
    if not head:
        return "is empty"
    if text.startswith(b"version https://git-lfs"):
        return "is a git-LFS pointer, not the weights; run `git lfs pull`"
    if text.startswith((b"<!doctype html", b"<html")):
        return "is an HTML page, not a checkpoint; the download went wrong"
    if text.startswith((b"{", b"[")):
        return "is JSON text, not a checkpoint"
    if not any(head):
        return "begins with nothing but zeros; is the download complete?"
    return "is not a checkpoint of any known format"
