"""Remote sources: one file behind a URL, read by ranges where its head is enough, else fetched once into a cache.

A `RemotePath` is to readers what a path is, so that none of them knows; `SourceFile` asks it who reads it.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

from converters.errors import CheckpointError, DamagedCheckpoint, OutputError
from converters.readers.files import SourceFile, is_url, refuse_neighbour
from converters.readers.remote.stores import State, Store, Transient, find_store, without_secrets

__all__ = ["FetchedFile", "Ranges", "RemoteFile", "RemotePath", "fetch", "fetch_path", "open_remote"]

BLOCK = 16 << 10  # bytes; smaller reads fetch whole blocks
AHEAD = 16  # blocks more, once reads follow one another
BLOCKS = 2048  # that are kept
CHUNK = 32 << 20  # bytes of one request while a whole file is fetched
PAUSES = (0.5, 2.0, 5.0)  # seconds before another attempt
SUFFIXES = (".h5", ".keras", ".onnx", ".pb", ".npz", ".safetensors")  # that frameworks look at
AGAIN = "try again later"
NO_RANGES = "the server reads no ranges, so the whole file was fetched"

Result = TypeVar("Result")
Progress = Callable[[int, int], None]  # bytes fetched, bytes in all


class Ranges:
    """A store's bytes by position: small reads come from blocks in memory, large ones straight from the store."""

    def __init__(self, store: Store, shown: str) -> None:
        self._store, self._shown = store, shown
        self.size = store.state.size
        self._blocks: OrderedDict[int, bytes] = OrderedDict()
        self._lock = Lock()

    def read(self, start: int, end: int) -> bytes:
        """Exactly these bytes of the file. Raises CheckpointError."""
        end = min(end, self.size)
        if end - start > BLOCK * BLOCKS // 8:
            return self.fetch(start, end)
        with self._lock:
            wanted = range(start // BLOCK, -(-end // BLOCK))
            found = {one: self._blocks[one] for one in wanted if one in self._blocks}
            if missing := [one for one in wanted if one not in found]:
                first, last = missing[0], missing[-1]
                if first - 1 in self._blocks:
                    last = min(last + AHEAD, (self.size - 1) // BLOCK)
                data = self.fetch(first * BLOCK, min((last + 1) * BLOCK, self.size))
                found |= {one: data[(one - first) * BLOCK :][:BLOCK] for one in range(first, last + 1)}
            for one, block in found.items():
                self._blocks[one] = block
                self._blocks.move_to_end(one)
            while len(self._blocks) > BLOCKS:
                self._blocks.popitem(last=False)
        return b"".join(found[one] for one in wanted)[start % BLOCK :][: end - start]

    def fetch(self, start: int, end: int) -> bytes:
        """Exactly these bytes from the store, in up to four attempts."""

        def attempt() -> bytes:
            data = self._store.read(start, end)
            if len(data) != end - start:
                raise Transient(f"the server sends {len(data)} of the {end - start} bytes from {start}")
            return data

        return _persist(attempt, self._shown) if end > start else b""

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file is another by now."""
        if self.size:
            self.fetch(self.size - 1, self.size)


@dataclass(frozen=True)
class RemotePath:
    """A path's face, as far as readers look at it, of one file behind a URL. Its neighbours are never there."""

    url: str  # without credentials and query
    ranges: Ranges | None = None
    local: Path | None = None  # where it was fetched to
    note: str = ""

    @property
    def source_file(self) -> type[SourceFile]:
        """What reads it."""
        return FetchedFile if self.local else RemoteFile if self.ranges else SourceFile

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self.url.rpartition("/")[0])

    def with_name(self, name: str) -> RemotePath:
        return RemotePath(f"{self.parent.url}/{name}")

    def with_suffix(self, suffix: str) -> RemotePath:
        return self.with_name(self.name.removesuffix(self.suffix) + suffix)

    def __truediv__(self, name: str) -> RemotePath:
        raise refuse_neighbour(f"{self.url}/{name}")

    def exists(self) -> bool:
        return bool(self.local or self.ranges)

    is_file = exists

    def is_dir(self) -> bool:
        return False

    def is_relative_to(self, other: object) -> bool:
        return False

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        return iter(())

    def resolve(self) -> Path:
        """The local file."""
        return self.local.resolve() if self.local else Path()

    def __fspath__(self) -> str:
        return self.url

    __str__ = __fspath__


class RemoteFile(SourceFile):
    """A file that is read by ranges, with the face of a SourceFile."""

    is_remote = True

    def __init__(self, path: RemotePath) -> None:
        if path.ranges is None:
            raise refuse_neighbour(path.url)
        self.path, self._ranges = path, path.ranges  # type: ignore[assignment]
        self._fd, self.size, self._crcs = -1, path.ranges.size, {}

    def _read_into(self, buffer: memoryview, offset: int) -> int:
        data = self._ranges.read(offset, offset + len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def check_unchanged(self) -> None:
        self._ranges.check_unchanged()


class FetchedFile(SourceFile):
    """A file of the cache, which its messages call by the URL."""

    def __init__(self, path: RemotePath) -> None:
        super().__init__(path.local or path.url)
        self.path = path  # type: ignore[assignment]


def open_remote(url: str) -> RemotePath:
    """The file at `url`, of which a reader fetches what it reads; whole, where the server knows no ranges."""
    shown = without_secrets(url)
    store = _persist(lambda: find_store(url), shown)
    if store.by_range:
        return RemotePath(shown, Ranges(store, shown))
    return RemotePath(shown, local=_keep(store, url), note=NO_RANGES)


def fetch(url: str, progress: Progress | None = None) -> RemotePath:
    """The file at `url`, whole and in the cache. Raises CheckpointError, and OutputError if the cache takes it not."""
    shown = without_secrets(url)
    return RemotePath(shown, local=_keep(_persist(lambda: find_store(url), shown), url, progress))


def fetch_path(source: str) -> Path:
    """A path that frameworks can open: of the cache, where `source` is a URL."""
    return fetch(source).resolve() if is_url(source) else Path(source)


def _keep(store: Store, url: str, progress: Progress | None = None) -> Path:
    """The cache's copy: named by the hash of URL, size and version, complete or absent."""
    state, shown = store.state, without_secrets(url)
    key = hashlib.sha256("\0".join((url, str(state.size), state.version)).encode()).hexdigest()
    folder = _cache_folder()
    place = folder / (key + next((one for one in SUFFIXES if shown.endswith(one)), ""))
    part = ""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if state.version and place.is_file() and place.stat().st_size == state.size and _is_intact(place, state):
            return place
        room = shutil.disk_usage(folder).free
        if state.size > room:
            raise OutputError(f"has no room for the {state.size} bytes of {shown}", file=folder)
        descriptor, part = tempfile.mkstemp(dir=folder, suffix=".part")
        with os.fdopen(descriptor, "wb") as file:
            _write(store, shown, file.write, progress, room // 2)
            file.flush()
            os.fsync(file.fileno())
        if not _is_intact(Path(part), state):
            raise DamagedCheckpoint("is not what its server says: the hash differs", file=shown, cure="fetch it again")
        os.replace(part, place)
        part = ""
        _sync(folder)
    except OSError as error:
        problem = f"cannot keep what is fetched: {(error.strerror or 'fails').lower()}"
        raise OutputError(problem, file=folder, cure="set XDG_CACHE_HOME to another place") from error
    finally:
        if part:
            os.unlink(part)
    return place


def _write(store: Store, shown: str, write: Callable[[bytes], object], progress: Progress | None, most: int) -> None:
    """Every byte of a store; at most `most` where it does not say how many."""
    size, done = store.state.size, 0
    for piece in _pieces(store, shown):
        done += len(piece)
        if done > (size if size >= 0 else most):
            raise DamagedCheckpoint(f"does not end after {done - len(piece)} bytes", file=shown, cure=AGAIN)
        write(piece)
        if progress:
            progress(done, max(size, done))
    if size >= 0 and done != size:
        raise DamagedCheckpoint(f"ends after {done} of its {size} bytes", file=shown, cure=AGAIN)


def _pieces(store: Store, shown: str) -> Iterator[bytes]:
    if store.by_range:
        ranges = Ranges(store, shown)
        yield from (ranges.fetch(start, min(start + CHUNK, ranges.size)) for start in range(0, ranges.size, CHUNK))
        return
    try:
        yield from store.stream()
    except Transient as error:
        raise CheckpointError(str(error), file=shown, cure=AGAIN) from error


def _is_intact(path: Path, state: State) -> bool:
    """Whether a file has the hashes that the server states, if it states any."""
    for name, wanted in (("sha256", state.sha256), ("md5", state.md5)):
        if wanted:
            digest = hashlib.new(name, usedforsecurity=False)
            with open(path, "rb") as file:
                while piece := file.read(1 << 20):
                    digest.update(piece)
            if wanted not in (digest.hexdigest(), base64.b64encode(digest.digest()).decode()):
                return False
    return True


def _persist(attempt: Callable[[], Result], shown: str) -> Result:
    """What `attempt` returns, once it no longer raises Transient."""
    for pause in PAUSES:
        try:
            return attempt()
        except Transient:
            time.sleep(pause)
    try:
        return attempt()
    except Transient as error:
        raise CheckpointError(str(error), file=shown, cure=AGAIN) from error


def _cache_folder() -> Path:
    """The place that the system has for what can be fetched again."""
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local")}
    home = os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, "~/.cache")
    return Path(home).expanduser() / "timmport"


def _sync(folder: Path) -> None:
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
