"""Lint: what is wrong with a mapping file although it can be read, found before any weight is.

An error is certain: rows that tie, a row that another always beats, a target that timm lacks, a reference that
cannot be asked. A warning is a row for which the references' own checkpoints have no use: a real one may.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

from converters.errors import TargetError
from converters.mapping import Mapping
from converters.names import Pattern, split
from converters.plan import Plan
from converters.routes import Route
from converters.rows import Drop, Fill, Rule, most_specific
from converters.target import build_skeleton

__all__ = ["Finding", "lint_closings", "lint_file"]

OUTPUT = re.compile(r"logits|forward_features|pre_logits|features\.[0-9]{1,3}")
GIVEN = {"num_classes", "num_features", "in_chans", "img_size"}  # what `$name` can be besides a target's own values
NUMBERS = ("0", "1", "10")  # that stand for a captured one
MOST = 200  # examples of a pattern


@dataclass(frozen=True)
class Finding:
    """Something to mend, or to look at."""

    line: int
    severity: str  # "error" or "warning"
    problem: str


def lint_file(mapping: Mapping, runners: Iterable[str]) -> list[Finding]:
    """What the file alone shows, and timm. `runners` are the references that there are."""
    return sorted([*_targets(mapping), *_references(mapping, set(runners)), *_ties(mapping)], key=_place)


def lint_closings(mapping: Mapping, closings: Sequence[tuple[tuple[Route, ...], Plan | None]]) -> list[Finding]:
    """What the references' checkpoints show: their routes, and their plans where one closes."""
    found = [*_unused_rows(mapping, [route for routes, _ in closings for route in routes])]
    filled = {fill for _, plan in closings if plan for fill in _used_fills(mapping, plan)}
    found += [
        Finding(fill.line, "warning", f"fill `{fill.text}` is needed by no target")
        for fill in mapping.fill
        if fill not in filled
    ]
    found += _detect(mapping, [routes for routes, _ in closings])
    return sorted(found, key=_place)


def _place(finding: Finding) -> tuple[int, str]:
    return finding.line, finding.problem


def _targets(mapping: Mapping) -> Iterator[Finding]:
    for target in mapping.targets:
        try:
            build_skeleton(target, mapping.args_of(target))
        except TargetError as error:
            yield Finding(mapping.lines.of("targets", target), "error", str(error))


def _references(mapping: Mapping, runners: set[str]) -> Iterator[Finding]:
    for number, reference in enumerate(mapping.references):
        several = ("reference", number) if ("reference", 0) in mapping.lines.by_path else ("reference",)
        if reference.runner not in runners:
            line = mapping.lines.of(*several, "runner")
            yield Finding(line, "error", f"no runner is called `{reference.runner}`; there are {', '.join(runners)}")
        for output in reference.outputs:
            if not OUTPUT.fullmatch(output):
                line = mapping.lines.of(*several, "outputs", output)
                yield Finding(line, "error", f"timm has no output `{output}`")
        for path, name in _names(reference.model):
            if name not in GIVEN and not any(name in row for row in mapping.targets.values()):
                line = mapping.lines.of(*several, "model", *path)
                yield Finding(line, "error", f"`${name}` is no value of any target, and is left out")


def _names(model: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Where a reference's model has a `$name`."""
    if isinstance(model, str) and model.startswith("$"):
        yield path, model[1:]
    elif isinstance(model, (dict, list)):
        for key, inner in model.items() if isinstance(model, dict) else enumerate(model):
            yield from _names(inner, (*path, key))


def _ties(mapping: Mapping) -> Iterator[Finding]:
    """Rows that tie on a name that one of them describes."""
    told = set[frozenset[int]]()
    tables: tuple[Sequence[Rule | Drop | Fill], ...] = (mapping.rows, mapping.fill)
    for rows in tables:
        for row in rows:
            for name in _examples(row.pattern):
                tied, _ = most_specific(rows, split(name))
                lines = frozenset(one.line for one in tied)
                if len(tied) > 1 and lines not in told:
                    told.add(lines)
                    last = max(tied, key=lambda one: one.line)
                    others = " and ".join(f"line {line}" for line in sorted(lines - {last.line}))
                    yield Finding(last.line, "error", f"`{last.pattern.text}` ties with {others} on `{name}`")


def _examples(pattern: Pattern) -> Iterator[str]:
    """Names that a pattern matches.

    >>> list(_examples(Pattern.parse("layer{s}.*.{q|k}")))[:3]
    ['layer0.x.q', 'layer0.x.k', 'layer1.x.q']
    """
    pieces = re.split(r"(\{[^{}]*\}|\*\*|\*)", pattern.text)
    ways: list[Sequence[str]] = [[piece] for piece in pieces]
    for index, piece in enumerate(pieces[1::2]):
        inside = piece.strip("{}")
        if "|" in inside:
            ways[2 * index + 1] = [word.strip() for word in inside.split("|")]
        elif inside in pattern.tables:
            ways[2 * index + 1] = list(pattern.tables[inside])
        else:
            ways[2 * index + 1] = ["x", ""] if "*" in inside else NUMBERS
    for name in map("".join, islice(product(*ways), MOST)):
        if all(split(name)):
            yield name


def _unused_rows(mapping: Mapping, routes: Sequence[Route]) -> Iterator[Finding]:
    used = {route.row for route in routes}
    for row in mapping.rows:
        if row in used:
            continue
        kind = "drop" if isinstance(row, Drop) else "rule"
        beaten = {route.row.line for route in routes if route.row and row.pattern.match(route.segments)}
        if beaten and not _wins_somewhere(mapping, row):
            problem = f"never wins: line {', '.join(map(str, sorted(beaten)))} takes all that it matches"
            yield Finding(row.line, "error", f"{kind} `{row.pattern.text}` {problem}")
        else:
            problem = "takes nothing from the references' checkpoints"
            yield Finding(row.line, "warning", f"{kind} `{row.pattern.text}` {problem}")


def _wins_somewhere(mapping: Mapping, row: Rule | Drop) -> bool:
    """Whether there is a tensor, by an example, that the row takes."""
    names = (split(f"{name}.weight") for name in _examples(row.pattern))
    return any(row in most_specific(mapping.rows, name)[0] for name in names)


def _used_fills(mapping: Mapping, plan: Plan) -> Iterator[Fill]:
    for step in plan.steps:
        if step.origin.fill is not None:
            yield from most_specific(mapping.fill, split(step.target.name))[0]


def _detect(mapping: Mapping, closings: Sequence[tuple[Route, ...]]) -> Iterator[Finding]:
    names = {name for routes in closings for route in routes for name in (route.own, split(route.spec.name))}
    for number, signs in enumerate(mapping.detect):
        for index, sign in enumerate(signs):
            if not sign.absent and not any(sign.pattern.match(name) for name in names):
                line = mapping.lines.of("detect", number, index)
                yield Finding(line, "warning", f"detect `{sign.text}` is in none of the references' checkpoints")
