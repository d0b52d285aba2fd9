"""Diagnosis: the problems of a plan as text that names the rows at fault, folds indices, and offers a cure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from converters.errors import PlanError, printable
from converters.folding import fold
from converters.mapping import Mapping
from converters.ops import IDENTITY, OpError
from converters.routes import Problem
from converters.rows import Drop, Fill, Rule

__all__ = ["KINDS", "cures", "diagnose"]

KINDS = {  # kind: what is said of one, of several
    "unmatched": ("source has no row and no drop", "sources have no row and no drop"),
    "nowhere": ("source leads nowhere", "sources lead nowhere"),
    "tie": ("name has rows that tie", "names have rows that tie"),
    "twice": ("source is there twice", "sources are there twice"),
    "clash": ("source leads where another leads", "sources lead where others lead"),
    "incomplete": ("target lacks a part", "targets lack a part"),
    "op": ("target's op does not fit", "targets' ops do not fit"),
    "shape": ("target has another shape", "targets have other shapes"),
    "dtype": ("target has another kind of dtype", "targets have another kind of dtype"),
    "missing": ("target has no origin", "targets have no origin"),
}
_MOST_LINES = 60


def diagnose(mapping: Mapping, target: str, problems: Sequence[Problem]) -> PlanError:
    """Every problem at once, folded, under the rows that cause them, and the cures that fit."""
    count = f"{len(problems)} problem{'s' * (len(problems) != 1)}"
    shipped = mapping.path != Path(mapping.name)
    lines = [f"{f'mappings/{mapping.name}.yaml' if shipped else mapping.path} does not close on {target} ({count})"]
    for kind, (one, several) in KINDS.items():
        of_kind = [problem for problem in problems if problem.kind == kind]
        if not of_kind:
            continue
        head = f"{len(of_kind)} {one if len(of_kind) == 1 else several}:"
        for rows, group in _by_rows(of_kind).items():
            for text, _ in fold(problem.name for problem in group):
                lines.append(f"  {head:<30} {printable(text)}")
                head = ""
            reason = printable(_reason(group), 300)
            lines += [f"     line {row.line}  {printable(row.text):<50} {reason}".rstrip() for row in rows]
            if not rows and reason:
                lines.append(f"     {reason}")
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"  ... and {len(lines) - _MOST_LINES} lines more; is this the right family?"]
    for left, right in cures(mapping, problems)[:_MOST_LINES]:
        lines.append(f"  try      {printable(left)}: {right}      (same indices, same shapes{_doubt(mapping)})")
    return PlanError("\n".join(lines))


def _doubt(mapping: Mapping) -> str:
    """What shapes do not show, where the family's other rows have ops of their own."""
    ways = (way for row in mapping.rows if isinstance(row, Rule) for way in row.ways)
    return "; its ops are yours to check" if any(way.ops != IDENTITY for way in ways) else ""


def cures(mapping: Mapping, problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """Rows that would bring orphaned sources to orphaned targets: the only pair with these indices and shapes."""
    found: list[tuple[str, str]] = []
    for number in (r"(?<![^./])[0-9]{1,9}(?![^./])", r"[0-9]{1,9}"):  # whole segments first, then any number
        sources = _groups(number, ((_stem(mapping, p), *_laid_out(mapping, p)) for p in _orphans(problems)))
        targets = _groups(
            number, ((*p.name.rpartition(".")[::2], p.spec.shape) for p in problems if p.kind == "missing")
        )
        alike: dict[Hashable, list[_Group]] = {}
        for target in targets:
            alike.setdefault(target.kind, []).append(target)
        pairs = [(s, t, shift) for s in sources for t in alike.get(s.kind, ()) if (shift := s.shift_to(t)) is not None]
        uses = Counter(id(group) for source, target, _ in pairs for group in (source, target))
        for source, target, shift in pairs:
            if uses[id(source)] == uses[id(target)] == 1:
                row = (source.text(), target.text(shift))
                if row[0] not in dict(found):
                    found.append(row)
    return found


def _orphans(problems: Iterable[Problem]) -> Iterable[Problem]:
    return (problem for problem in problems if problem.kind in ("nowhere", "unmatched"))


def _by_rows(problems: Iterable[Problem]) -> dict[tuple[Rule | Drop | Fill, ...], list[Problem]]:
    groups: dict[tuple[Rule | Drop | Fill, ...], list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.rows, []).append(problem)
    return groups


def _reason(group: Sequence[Problem]) -> str:
    if group[0].target:
        (text, _), *more = fold(problem.target for problem in group)
        return f"the target has no {text}" + (f" and {len(more)} more" if more else "")
    details = list(dict.fromkeys(problem.detail for problem in group if problem.detail))
    return details[0] + (f" (and {len(details) - 1} like it)" if len(details) > 1 else "") if details else ""


def _stem(mapping: Mapping, problem: Problem) -> str:
    return ".".join(mapping.stripped(problem.name)[:-1])


def _laid_out(mapping: Mapping, problem: Problem) -> tuple[str, tuple[int, ...]]:
    """A source's leaf as timm would name it, and the shape that it would have."""
    leaf, shape = mapping.stripped(problem.name)[-1], problem.spec.shape
    for way in mapping.leaves.get(leaf, ()):
        if way.rank in (None, len(shape)):
            try:
                return way.name, way.ops.shapes([shape])[0]
            except OpError:
                break
    return leaf, shape


Leaves = frozenset[tuple[str, tuple[int, ...]]]  # a module's leaves with their shapes


@dataclass(frozen=True, eq=False)
class _Group:
    """Modules whose names differ in numbers only."""

    literals: tuple[str, ...]
    modules: dict[tuple[int, ...], Leaves]

    @cached_property
    def kind(self) -> Hashable:
        """What two groups must have in common to be a pair: how many indices, and the modules' leaves."""
        return len(self.varying), frozenset(Counter(self.modules.values()).items())

    @cached_property
    def varying(self) -> list[int]:
        """The positions whose numbers differ; the others are part of the name."""
        return [p for p in range(len(self.literals) - 1) if len({indices[p] for indices in self.modules}) > 1]

    @cached_property
    def keyed(self) -> dict[tuple[int, ...], Leaves]:
        return {tuple(indices[p] for p in self.varying): leaves for indices, leaves in self.modules.items()}

    def shift_to(self, other: _Group) -> tuple[int, ...] | None:
        """What to add to each index of mine to get the other's, if then every module has the same leaves and shapes."""
        mine, theirs = self.keyed, other.keyed
        shift = tuple(b - a for a, b in zip(min(mine), min(theirs), strict=True))
        moved = {tuple(i + s for i, s in zip(indices, shift, strict=True)): leaves for indices, leaves in mine.items()}
        return shift if moved == theirs else None

    def text(self, shift: tuple[int, ...] = ()) -> str:
        """The group as a pattern, or as a template with the shift in its expressions."""
        text, letters = self.literals[0], iter("ijklmn")
        some = next(iter(self.modules))
        for position, literal in enumerate(self.literals[1:]):
            if position in self.varying:
                offset = shift[self.varying.index(position)] if shift else 0
                text += "{" + next(letters) + (f"{offset:+d}" if offset else "") + "}" + literal
            else:
                text += str(some[position]) + literal
        return text


def _groups(number: str, tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> list[_Group]:
    modules: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for module, leaf, shape in tensors:
        modules.setdefault(module, set()).add((leaf, shape))
    grouped: dict[tuple[str, ...], dict[tuple[int, ...], Leaves]] = {}
    find: Callable[[str], list[str]] = re.compile(f"({number})").split
    for module, leaves in modules.items():
        parts = find(module)
        grouped.setdefault(tuple(parts[::2]), {})[tuple(map(int, parts[1::2]))] = frozenset(leaves)
    return [_Group(literals, found) for literals, found in grouped.items() if len(literals) <= 7]
