"""The rows of a mapping, each parsed once: what they match, where they lead, and which of several wins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from converters.names import Match, Pattern, Template
from converters.ops import Pipeline

__all__ = ["Drop", "Fill", "Leaf", "Leaves", "Numbering", "Rule", "Sign", "Way", "most_specific"]


@dataclass(frozen=True)
class Leaf:
    """One way to write a leaf: its name in timm and the ops that lay it out; `rank` chooses between ways."""

    name: str
    ops: Pipeline
    rank: int | None


Leaves = dict[str, tuple[Leaf, ...]]


@dataclass(frozen=True)
class Way:
    """Where a rule leads, if what its guard names is there."""

    template: Template
    ops: Pipeline
    source: Template | None = None
    target: Template | None = None


@dataclass(frozen=True, eq=False)
class Rule:
    """One row of the table; the first way whose guard holds is taken."""

    line: int
    pattern: Pattern
    ways: tuple[Way, ...]

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.ways[0].template.text}"


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


@dataclass(frozen=True, eq=False)
class Drop:
    """A source that is discarded, and why."""

    line: int
    pattern: Pattern
    reason: str
    zeros: bool = False  # its values must be zero

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Fill:
    """A value for targets that no source reaches."""

    line: int
    pattern: Pattern
    value: int | float
    reason: str = ""  # a caveat

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.value}"


@dataclass(frozen=True)
class Numbering:
    """An entry of `enumerate`: captures on the left that stand for the target's modules, counted through.

    `n: blocks.{s}.{b}` has {n} be the number itself; `layers.{i}.{j}: blocks.{s}.{b}` counts the source's modules
    too, and the first is the first.
    """

    source: Pattern
    target: Pattern
    counted: bool  # whether the source's modules are

    @classmethod
    def parse(cls, left: str, target: Pattern, tables: dict[str, Any]) -> Numbering:
        """Raises ValueError."""
        counted = "{" in left
        return cls(Pattern.parse(left if counted else f"{{{left}}}", tables), target, counted)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(sorted(self.source.fields))


Row = TypeVar("Row", bound=Rule | Drop | Fill)


def most_specific(rows: Iterable[Row], name: tuple[str, ...]) -> tuple[list[Row], Match | None]:
    """The rows that match a name and take most of it, most literally: none, one, or the several that tie."""
    best: list[Row] = []
    found: Match | None = None
    for row in rows:
        match = row.pattern.match(name)
        if match is None or (found and match.rank < found.rank):
            continue
        if found is None or match.rank > found.rank:
            best, found = [row], match
        else:
            best.append(row)
    return best, found
