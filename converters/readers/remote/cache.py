"""The cache of remote files that were fetched whole: complete or absent, with the hashes that their servers state."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from converters.errors import CheckpointError, DamagedCheckpoint, OutputError
from converters.readers.remote.ranges import AGAIN, Ranges
from converters.readers.remote.stores import State, Store, Transient, without_secrets

__all__ = ["Progress", "keep"]

CHUNK = 32 << 20  # bytes of one request while a whole file is fetched
SUFFIXES = (".h5", ".keras", ".onnx", ".pb", ".npz", ".safetensors")  # that frameworks look at

Progress = Callable[[int, int], None]  # bytes fetched, bytes in all


def keep(store: Store, url: str, progress: Progress | None = None) -> Path:
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
