"""Memory for what is read: large pieces are used again as soon as nobody looks at them any more.

The system fills fresh memory with zeros, page by page, which takes longer than reading a cached file into it.
"""

from __future__ import annotations

import mmap
import sys
from threading import Lock

__all__ = ["Memory"]

LARGE = 4 << 20
MOST = 2  # pieces that are kept: one is looked at while the next is filled
_ONE = [object()]
_UNSEEN = sys.getrefcount(_ONE[0]) if hasattr(sys, "getrefcount") else 0  # what a list alone refers to


class Memory:
    """Writable memory, piece after piece.

    >>> memory = Memory()
    >>> first = memory.take(LARGE)
    >>> first[0] = 7
    >>> memory.take(LARGE)[0], first[0]
    (0, 7)
    >>> part = first[:9]
    >>> del first
    >>> memory.take(LARGE)[0]  # the part is still looked at
    0
    >>> del part
    >>> memory.take(LARGE)[0]
    7
    """

    def __init__(self) -> None:
        self._pieces: list[mmap.mmap] = []  # the last ones taken
        self._lock = Lock()

    def take(self, nbytes: int) -> memoryview:
        """That many bytes, of any content; in huge pages where they are many."""
        if nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return memoryview(bytearray(nbytes))
        with self._lock:
            for index in range(len(self._pieces)):
                if sys.getrefcount(self._pieces[index]) == _UNSEEN and nbytes <= len(self._pieces[index]):
                    piece = self._pieces.pop(index)
                    break
            else:
                piece = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                piece.madvise(mmap.MADV_HUGEPAGE)
            self._pieces = [*self._pieces, piece][-MOST:]
        return memoryview(piece)[:nbytes]
