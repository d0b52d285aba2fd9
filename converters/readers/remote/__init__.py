"""Remote sources: what lies behind a URL, read by ranges where a look is enough, else fetched once into a cache.

A `RemotePath` is to readers what a path is, so that none of them knows; `SourceFile` asks it who reads it. A URL names
one file, and nothing beside it is opened but the data files of TensorFlow's `NAME.index`; or a folder, of which those
files are that its index names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from threading import Lock

from converters.errors import CheckpointError
from converters.readers.files import SourceFile, is_url, refuse_neighbour
from converters.readers.remote.cache import Progress, keep
from converters.readers.remote.ranges import Ranges, persist
from converters.readers.remote.stores import Folder, find_store, without_secrets

__all__ = [
    "FetchedFile",
    "RemoteFile",
    "RemoteFolder",
    "RemotePath",
    "fetch",
    "fetch_path",
    "open_remote",
]

INDEX, DATA_FILE = ".index", re.compile(r"\.index|\.data-\d{5}-of-\d{5}")
NO_RANGES = "the server reads no ranges, so the whole file was fetched"


@dataclass(frozen=True)
class RemotePath:
    """A path's face, as far as readers look at it, of a file or a folder behind a URL."""

    url: str  # without credentials and query
    ranges: Ranges | None = None
    local: Path | None = None  # where it was fetched to
    note: str = ""
    folder: RemoteFolder | None = None  # that was named, and that it is or lies in

    @property
    def source_file(self) -> type[SourceFile]:
        """What reads it."""
        opened = self.opened()
        return FetchedFile if opened.local else RemoteFile if opened.ranges else SourceFile

    def opened(self) -> RemotePath:
        """The same with the way to its bytes, if it is a file that may be read."""
        if self.ranges or self.local or not (self.folder and self.folder.holds(self.url)):
            return self
        return self.folder.open(self.url)

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0], folder=self.folder)

    def with_name(self, name: str) -> RemotePath:
        return RemotePath(f"{self.parent.url}/{name}", folder=self.folder)

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.with_name(self.name.removesuffix(self.suffix) + suffix)

    def __truediv__(self, name: str) -> RemotePath:
        if self.folder is None:
            raise refuse_neighbour(f"{self.url}/{name}")
        return RemotePath(f"{self.url}/{name}", folder=self.folder)

    def __lt__(self, other: RemotePath) -> bool:
        return self.url < other.url

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return bool(self.local or self.ranges or (self.folder and self.folder.holds(self.url)))

    def is_dir(self) -> bool:
        return self.folder is not None and self.folder.is_folder(self.url)

    def is_relative_to(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.url.startswith(f"{other.url}/")

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return PurePosixPath(self.url.removeprefix(f"{other.url}/"))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """The files in this folder that the pattern names; none of folders below."""
        for name in self.folder.files(self.url) if self.folder else ():
            if fnmatchcase(name, pattern):
                yield self / name

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        raise refuse_neighbour(self.url)

    def resolve(self) -> Path:
        """The local file."""
        local = self.opened().local
        return local.resolve() if local else Path()

    def __fspath__(self) -> str:
        return self.url

    __str__ = __fspath__


class RemoteFolder:
    """A folder that a URL names: its files, each of which is opened when it is first read, and the folders below."""

    def __init__(self, url: str, whole: bool = False, progress: Progress | None = None) -> None:
        self.url = without_secrets(url).rstrip("/")
        self._url, self._whole, self._progress = url.rstrip("/"), whole, progress
        self._opened: dict[str, RemotePath] = {}
        self._listed: dict[str, Folder] = {}
        self._lock = Lock()

    def files(self, url: str) -> frozenset[str]:
        """The names of the files in this folder, or in one below."""
        return self._list(url).files

    def holds(self, url: str) -> bool:
        """Whether this is one of its files."""
        parent, _, name = url.rpartition("/")
        return name in self._list(parent).files

    def is_folder(self, url: str) -> bool:
        """Whether it is this folder, or one below."""
        parent, _, name = url.rpartition("/")
        return url == self.url or name in self._list(parent).folders

    def open(self, url: str) -> RemotePath:
        """One of its files, with the way to its bytes."""
        with self._lock:
            if url not in self._opened:
                self._opened[url] = _open(self._behind(url), self._whole, self._progress)
            return self._opened[url]

    def _list(self, url: str) -> Folder:
        if url not in self._listed:
            inside = f"{url}/".startswith(f"{self.url}/") and self.is_folder(url)
            store = persist(lambda: find_store(self._behind(url)), url) if inside else None
            self._listed[url] = store if isinstance(store, Folder) else Folder(frozenset(), frozenset())
        return self._listed[url]

    def _behind(self, url: str) -> str:
        return self._url + url[len(self.url) :]


class _Bundle(RemoteFolder):
    """The files of a TensorFlow checkpoint, whose names its index tells: no folder is listed."""

    def files(self, url: str) -> frozenset[str]:
        return frozenset()

    def holds(self, url: str) -> bool:
        return url.startswith(self.url) and bool(DATA_FILE.fullmatch(url[len(self.url) :]))

    def is_folder(self, url: str) -> bool:
        return False


class RemoteFile(SourceFile):
    """A file that is read by ranges, with the face of a SourceFile."""

    is_remote = True

    def __init__(self, path: RemotePath) -> None:
        ranges = path.opened().ranges
        if ranges is None:
            raise refuse_neighbour(path.url)
        self.path, self._ranges = path, ranges  # type: ignore[assignment]
        self._fd, self.size, self._crcs = -1, ranges.size, {}

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        data = self._ranges.read(offset, offset + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        self._ranges.check_unchanged()


class FetchedFile(SourceFile):
    """A file of the cache, which its messages call by the URL."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__(path.opened().local or path.url)
        self.path = path  # type: ignore[assignment]


def open_remote(url: str) -> RemotePath:
    """What lies at `url`, of which a reader fetches what it reads; whole, where the server knows no ranges."""
    return _open(url)


def fetch(url: str, progress: Progress | None = None) -> RemotePath:
    """The file at `url`, whole and in the cache; of a folder every file as soon as it is read.

    Raises CheckpointError, and OutputError if the cache takes it not.
    """
    return _open(url, whole=True, progress=progress)


def fetch_path(source: str) -> Path:
    """A path that frameworks can open: of the cache, where `source` is a URL."""
    if not is_url(source):
        return Path(source)
    path = fetch(source)
    if path.is_dir():
        raise CheckpointError("is a folder", file=path.url, cure="fetch the folder and give its path")
    return path.resolve()


def _open(url: str, whole: bool = False, progress: Progress | None = None) -> RemotePath:
    shown = without_secrets(url)
    store = persist(lambda: find_store(url), shown)
    if isinstance(store, Folder):
        folder = RemoteFolder(url, whole, progress)
        return RemotePath(folder.url, folder=folder)
    beside = _Bundle(url.removesuffix(INDEX), whole, progress) if url.endswith(INDEX) else None
    if store.by_range and not whole:
        return RemotePath(shown, Ranges(store, shown), folder=beside)
    return RemotePath(shown, local=keep(store, url, progress), note="" if whole else NO_RANGES, folder=beside)
