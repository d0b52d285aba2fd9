"""The rows of a mapping, each parsed once: what they match, where they lead, and which of several wins."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from converters.names import Match, Pattern, Template, split
from converters.ops import IDENTITY, Pipeline

__all__ = ["Drop", "Fill", "Leaf", "Leaves", "Numbered", "Numbering", "Rule", "Stack", "Way", "most_specific"]

MAX_LAYERS = 1 << 10  # of a stack


@dataclass(frozen=True)
class Leaf:
    """One way to write a leaf: its name in timm and the ops that lay it out; `rank` chooses between ways."""

    name: str
    ops: Pipeline
    rank: int | None


Leaves = dict[str, tuple[Leaf, ...]]
Captures = dict[str, Any]


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


@dataclass(frozen=True, eq=False)
class Drop:
    """A source that is discarded, and why."""

    line: int
    pattern: Pattern
    reason: str
    zeros: bool = False  # its values must be zero
    buffer: Template | None = None  # its shape and values must be those that timm computes, behind the ops
    ops: Pipeline = IDENTITY

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Fill:
    """A value for targets that no source reaches."""

    line: int
    pattern: Pattern
    value: int | float | str  # or a formula's name
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
    targets: tuple[Pattern, ...]  # several are counted together, in the model's order
    counted: bool  # whether the source's modules are

    @classmethod
    def parse(cls, left: str, targets: tuple[Pattern, ...], tables: dict[str, Any]) -> Numbering:
        """Raises ValueError."""
        counted = "{" in left
        return cls(Pattern.parse(left if counted else f"{{{left}}}", tables), targets, counted)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(sorted(self.source.fields))

    def number(self, modules: Sequence[Captures], sources: Iterable[tuple[str, ...]]) -> Numbered:
        """The captures of the target's modules, in their order, by those of the source's."""
        if self.counted:
            keys = [tuple(captures[field] for field in self.fields) for captures in self.source.number(sources)]
        else:
            keys = [(number,) for number in range(len(modules))]
        return Numbered(
            self.fields, " and ".join(target.text for target in self.targets), dict(zip(keys, modules, strict=False))
        )


@dataclass(frozen=True)
class Numbered:
    """The target's modules by the captures that stand for them."""

    fields: tuple[str, ...]
    text: str
    modules: dict[tuple[Any, ...], Captures]

    def find(self, captures: Captures) -> Captures:
        """The captures of the module that these stand for; none where they stand for none."""
        return self.modules.get(tuple(captures.get(field) for field in self.fields), {})


@dataclass(frozen=True)
class Stack:
    """An entry of `unstack`: modules whose tensors are stacks, and what the rows call a layer of them.

    >>> stack = Stack.parse("block", "block_{i}", {})
    >>> stack.layers(("block", "norm", "scale"), (2, 192))
    [('block_0', 'norm', 'scale'), ('block_1', 'norm', 'scale')]
    """

    pattern: Pattern
    layer: Template
    number: str  # the field of `layer` that counts

    @classmethod
    def parse(cls, left: str, right: str, tables: dict[str, Any]) -> Stack:
        """Raises ValueError."""
        pattern, layer = Pattern.parse(left, tables), Template.parse(right)
        counts = sorted(layer.fields - pattern.fields)
        if len(counts) != 1 or len(layer.render(dict.fromkeys(layer.fields, 1))) != 1:
            raise ValueError(f"`{right}` needs one capture that is not on the left, for a layer's number")
        return cls(pattern, layer, counts[0])

    def layers(self, name: tuple[str, ...], shape: tuple[int, ...]) -> list[tuple[str, ...]]:
        """The names of a stack's layers; none for a tensor that is none of these."""
        match = self.pattern.match(name)
        if not match or not match.rest or not shape or shape[0] > MAX_LAYERS:
            return []
        numbers = ({**match.captures, self.number: number} for number in range(shape[0]))
        return [(*split(self.layer.render(captures)[0]), *match.rest) for captures in numbers]


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
