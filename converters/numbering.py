"""Automatic names: layers that a framework numbers by how many its session has made before.

The second model of a session begins with `conv2d_96`, and old Keras with `conv2d_1`; only the order says which is
which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

__all__ = ["renumber"]

Segments = tuple[str, ...]


def renumber(names: Mapping[str, Segments], kinds: Iterable[str]) -> dict[str, Segments]:
    """The names with the numbers that a new session would have given: `conv2d`, `conv2d_1`, `conv2d_2`.

    >>> renumber({"a": ("conv2d_9", "bias"), "b": ("conv2d_96", "bias"), "c": ("conv2d_x",)}, ["conv2d"])
    {'a': ('conv2d', 'bias'), 'b': ('conv2d_1', 'bias'), 'c': ('conv2d_x',)}
    """
    found = dict(names)
    for kind in kinds:
        automatic = re.compile(rf"{re.escape(kind)}(?:_([0-9]{{1,9}}))?")
        numbers = {
            name: int(match[1] or 0)
            for name, segments in names.items()
            if segments and (match := automatic.fullmatch(segments[0]))
        }
        ranks = {number: rank for rank, number in enumerate(sorted(set(numbers.values())))}
        for name, number in numbers.items():
            first = f"{kind}_{ranks[number]}" if ranks[number] else kind
            found[name] = (first, *names[name][1:])
    return found
