"""Signatures: the names by which a family is detected, read from its file before anything else of it.

There are many families and a checkpoint is of few; to the others it costs this much and no more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from converters.errors import MappingError
from converters.names import Pattern, split
from converters.numbering import renumber
from converters.strict_yaml import load
from converters.tensors import TensorSpec

__all__ = ["Sign", "Signature", "read_signature"]

_BLOCKS = re.compile(r"^(?:detect|strip|renumber|tables):.*\n?(?:(?![A-Za-z_\"']).*\n)*", re.MULTILINE)
_NOT_LITERAL = re.compile(r"\{[^{}]*\}|[./*]")


@dataclass(frozen=True)
class Sign:
    """What a family is detected by: a name that is there, with a shape where that tells, or one that is not.

    >>> sign = Sign.parse("conv{i}.weight | o i 7 7", {})
    >>> [sign.found([("conv1", "weight")], [shape]) for shape in [(64, 3, 7, 7), (64, 3, 3, 3)]]
    [True, False]
    >>> Sign.parse("not fc", {}).found([("conv1", "weight")], [()])
    True
    """

    text: str
    pattern: Pattern
    shape: tuple[int | None, ...] | None
    absent: bool

    @classmethod
    def parse(cls, text: str, tables: dict[str, Any]) -> Sign:
        """Raises ValueError."""
        name, bar, axes = text.removeprefix("not ").partition(" | ")
        shape = tuple(int(axis) if axis.isdecimal() else None for axis in axes.split()) if bar else None
        return cls(text, Pattern.parse(name, tables), shape, text.startswith("not "))

    def found(self, names: Iterable[tuple[str, ...]], shapes: Iterable[tuple[int, ...]]) -> bool:
        """Whether names and their shapes show it."""
        return any(map(self._matches, names, shapes)) != self.absent

    def _matches(self, name: tuple[str, ...], shape: tuple[int, ...]) -> bool:
        match = self.pattern.match(name)
        if match is None or self.shape is None:
            return match is not None
        same = len(shape) == len(self.shape) and all(a in (b, None) for a, b in zip(self.shape, shape, strict=True))
        return same and not match.rest


@dataclass(frozen=True)
class Signature:
    """What must be among a checkpoint's names, and the prefixes that these may have."""

    detect: tuple[tuple[Sign, ...], ...]  # one of each
    strip: tuple[Pattern, ...]
    renumber: tuple[str, ...]  # what automatic names begin with

    def stripped(self, name: str) -> tuple[str, ...]:
        """A source name's segments without the prefixes that the family may carry."""
        segments = split(name)
        for prefix in self.strip:
            found = prefix.match(segments)
            if found and found.rest:
                segments = found.rest
        return segments

    def segments(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Every source name's segments as the rows see them: without prefixes, automatic names renumbered."""
        return renumber({name: self.stripped(name) for name in names}, self.renumber)

    def applies(self, specs: Mapping[str, TensorSpec]) -> bool:
        """Whether a checkpoint with these tensors may be of the family."""
        return all(any(self._shows(sign, specs) for sign in signs) for signs in self.detect)

    def _shows(self, sign: Sign, specs: Mapping[str, TensorSpec]) -> bool:
        literals = () if self.renumber else _literals(sign.pattern.text)
        near = [name for name in specs if all(literal in name for literal in literals)]
        names, shapes = [split(name) for name in near], [specs[name].shape for name in near]
        if self.strip or self.renumber:
            names, shapes = [*names, *self.segments(near).values()], shapes * 2
        return sign.found(names, shapes)


@lru_cache(maxsize=256)
def read_signature(text: str) -> Signature | None:
    """That of a mapping file's text; None where only the whole file can tell, or what is wrong with it.

    >>> signature = read_signature("targets: any\\ndetect:\\n  - a.{i}\\nrules: [")
    >>> signature.applies({"a.1.weight": TensorSpec("a.1.weight", (), "float32")})
    True
    """
    try:
        data, _ = load("".join(_BLOCKS.findall(text)), "")
        tables, strip = data.get("tables", {}), data.get("strip", [])
        return Signature(
            tuple(
                tuple(Sign.parse(one, tables) for one in ([patterns] if isinstance(patterns, str) else patterns))
                for patterns in data["detect"]
            ),
            tuple(Pattern.parse(one.rstrip("./")) for one in ([strip] if isinstance(strip, str) else strip)),
            tuple(data.get("renumber", [])),
        )
    except (MappingError, AttributeError, KeyError, TypeError, ValueError):
        return None


@lru_cache(maxsize=4096)
def _literals(pattern: str) -> tuple[str, ...]:
    """What every name has that the pattern matches, the longest first.

    >>> _literals("stages.{i}.blocks.*.attn.{q|k}")
    ('stages', 'blocks', 'attn')
    """
    return tuple(sorted(filter(None, _NOT_LITERAL.split(pattern)), key=len, reverse=True))
