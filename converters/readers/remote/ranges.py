"""Ranges: a store's bytes by position, asked for again where a fault may pass."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from converters.errors import CheckpointError
from converters.readers.remote.stores import Store, Transient

__all__ = ["AGAIN", "Ranges", "persist"]

BLOCK = 16 << 10  # bytes; smaller reads fetch whole blocks
AHEAD = 16  # blocks more, once reads follow one another
BLOCKS = 2048  # that are kept
PAUSES = (0.5, 2.0, 5.0)  # seconds before another attempt
AGAIN = "try again later"

Result = TypeVar("Result")


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

        return persist(attempt, self._shown) if end > start else b""

    def check_unchanged(self) -> None:
        """Raise CheckpointError if the file is another by now."""
        if self.size:
            self.fetch(self.size - 1, self.size)


def persist(attempt: Callable[[], Result], shown: str) -> Result:
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
