"""Folding: many names told as few, over their numbers and last segments."""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["fold"]


def fold(names: Iterable[str]) -> list[tuple[str, int]]:
    """Names folded over their numbers and last segments, each fold with how many names it stands for.

    >>> fold(["b.0.fc.weight", "b.0.fc.bias", "b.1.fc.weight", "b.1.fc.bias", "norm.bias"])
    [('b.{0..1}.fc.{weight,bias}', 4), ('norm.bias', 1)]
    """
    by_leaf: dict[tuple[str, ...], tuple[list[list[str]], int]] = {}
    for name in names:
        parts = re.split(r"([0-9]{1,9})", name)
        ranges, count = by_leaf.setdefault(tuple(parts[::2]), ([[] for _ in parts[1::2]], 0))
        for numbers, number in zip(ranges, parts[1::2], strict=True):
            numbers.append(number)
        by_leaf[tuple(parts[::2])] = ranges, count + 1
    by_module: dict[tuple[str, str], int] = {}
    for literals, (ranges, count) in by_leaf.items():
        texts = [*map(_range, ranges), ""]
        cut = max(literals[-1].rfind("."), literals[-1].rfind("/")) + 1
        module = "".join(a + b for a, b in zip(literals[:-1], texts, strict=False)) + literals[-1][:cut]
        place = (module, literals[-1][cut:]) if cut else ("", module + literals[-1])
        by_module[place] = by_module.get(place, 0) + count
    folded: dict[str, dict[str, int]] = {}
    for (module, leaf), count in by_module.items():
        folded.setdefault(module if module else leaf, {})[leaf if module else ""] = count
    return [
        (module + (next(iter(leaves)) if len(leaves) == 1 else "{" + ",".join(leaves) + "}"), sum(leaves.values()))
        for module, leaves in folded.items()
    ]


def _range(numbers: list[str]) -> str:
    """The least and the greatest, as they are spelled.

    >>> _range(["2", "1", "10"]), _range(["08", "12"]), _range(["00"])
    ('{1..10}', '{08..12}', '00')
    """
    low, high = min(numbers, key=int), max(numbers, key=int)
    return low if int(low) == int(high) else f"{{{low}..{high}}}"
