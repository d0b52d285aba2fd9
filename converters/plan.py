"""Plans: where every target tensor comes from, decided on names and shapes alone.

`route` asks the mapping about every source; it knows no target and is done once. `make_plan` brings the
routes to one target and returns a plan that closes, or every problem that keeps it from closing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from converters.folding import fold
from converters.mapping import Mapping
from converters.names import Match, Pattern, prefixes, split
from converters.ops import IDENTITY, OpError, Pipeline
from converters.routes import Existing, Homeless, Problem, Route, follow
from converters.rows import Drop, Rule, most_specific
from converters.target import Skeleton, Traits
from converters.tensors import TensorSpec, size_of

__all__ = ["Change", "Origin", "Plan", "Step", "make_plan", "read_off", "rendered", "without_classifier"]


@dataclass(frozen=True)
class Origin:
    """Where tensors come from: sources through ops by a rule, or a constant."""

    sources: tuple[str, ...] = ()
    ops: Pipeline = IDENTITY
    rule: Rule | None = None
    fill: int | float | str | None = None  # a value, or a formula's name
    parts: int = 1  # how many targets it gives


@dataclass(frozen=True)
class Step:
    """One target tensor: its spec as it will be written, and its origin."""

    target: TensorSpec
    origin: Origin
    part: int = 0  # which of the origin's results


@dataclass(frozen=True)
class Change:
    """What the user asked for beyond the source's own sizes (see changes.py)."""

    text: str  # the op and its tensors, folded
    inside: bool  # whether features change too, and not only a classifier
    classes: tuple[int, ...] = ()  # which of the source's classes are kept, in this order
    tensors: tuple[str, ...] = ()  # whose values are no longer the source's


@dataclass(frozen=True)
class Plan:
    """A conversion that closes."""

    mapping: Mapping
    skeleton: Skeleton
    steps: tuple[Step, ...]
    drops: dict[str, Drop]  # source name: the row that discards it
    caveats: tuple[str, ...] = ()  # what the file cannot rule out; to be shown
    unchanged: Skeleton | None = None  # the source's own, where changes were asked for
    changes: tuple[Change, ...] = ()
    preprocess: dict[str, Any] = field(default_factory=dict)  # the mapping's, and over it what the file says
    bgr: bool = False  # whether the first convolution was turned, since the source takes BGR images

    def drops_without(self, steps: Iterable[Step], reason: str) -> dict[str, Drop]:
        """Its drops, and for this reason the sources that are needed by its own steps and not by these."""
        used = {source for step in steps for source in step.origin.sources}
        lost = {source for step in self.steps for source in step.origin.sources} - used
        return {**self.drops, **dict.fromkeys(sorted(lost), Drop(0, Pattern.parse("**"), reason))}

    @property
    def origins(self) -> dict[int, list[Step]]:
        """Steps that share an origin, by the origin's identity: a scatter is read and computed once."""
        grouped: dict[int, list[Step]] = {}
        for step in self.steps:
            grouped.setdefault(id(step.origin), []).append(step)
        return grouped


def read_off(mapping: Mapping, routes: tuple[Route, ...], traits: Traits) -> dict[str, int]:
    """The classes and input channels that the source itself has, as timm arguments."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    for item, names, ops in _without_target(mapping, routes):
        try:
            shape = ops.shapes([item.spec.shape], len(names))[0]
        except OpError:
            continue  # a gather's member; no classifier and no stem
        shapes.update((split(name), shape) for name in names)
    args: dict[str, int] = {}
    heads = [shapes.get((*split(name), "weight"), ()) for name in traits.classifiers]
    stems = [shapes.get((*split(name), "weight"), ()) for name in traits.first_convs]
    classes = next((head[0] for head in heads if head), 0)
    channels = [stem[1] for stem in stems if len(stem) == 4]
    if traits.classifiers and classes != traits.num_classes:
        args["num_classes"] = classes
    if channels and channels[0] != traits.in_chans:
        args["in_chans"] = channels[0]
    return args


def without_classifier(mapping: Mapping, routes: tuple[Route, ...], traits: Traits) -> tuple[Route, ...]:
    """The routes, of which those to timm's classifier lead nowhere."""
    drop = Drop(0, Pattern.parse("**"), "the classifier was removed on request")
    heads = {id(item) for item, names, _ in _without_target(mapping, routes) if _inside(names, traits.classifiers)}
    return tuple(replace(item, row=drop) if id(item) in heads else item for item in routes)


def _inside(names: Iterable[str], modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for name in names for module in modules)


def rendered(mapping: Mapping, routes: tuple[Route, ...]) -> frozenset[str]:
    """The target names that the routes lead to, as far as rules tell without a target."""
    return frozenset(name for _, names, _ in _without_target(mapping, routes) for name in names)


def _without_target(mapping: Mapping, routes: tuple[Route, ...]) -> Iterator[tuple[Route, tuple[str, ...], Pipeline]]:
    """Each route that needs no target to be followed, with the names and ops at its end."""
    existing = Existing(frozenset(), prefixes(item.segments for item in routes))
    for item in routes:
        if not item.problem and isinstance(item.row, Rule):
            with suppress(KeyError, Homeless):
                yield item, *follow(mapping, item, existing, ())


def make_plan(mapping: Mapping, routes: tuple[Route, ...], skeleton: Skeleton) -> Plan | tuple[Problem, ...]:
    """The plan for one target, or every problem that keeps it from closing."""
    draft = _Draft(mapping, skeleton, routes)
    for item in routes:
        draft.add(item)
    return draft.close()


@dataclass
class _Gather:
    """Sources on their way to the same targets, by the same row, captures and ops."""

    rule: Rule
    names: tuple[str, ...]
    ops: Pipeline
    captures: dict[str, int | str]
    layer: tuple[int, int]  # of stacks
    members: dict[int, TensorSpec] = field(default_factory=dict, compare=False)


class _Draft:
    """A plan while routes are brought to it."""

    def __init__(self, mapping: Mapping, skeleton: Skeleton, routes: tuple[Route, ...]) -> None:
        self.mapping, self.skeleton = mapping, skeleton
        self.existing = Existing(skeleton.modules, prefixes(item.segments for item in routes))
        self.numbered = tuple(
            one.number(skeleton.number(*one.targets), (item.segments for item in routes)) for one in mapping.enumerate
        )
        self.problems: list[Problem] = []
        self.drops: dict[str, Drop] = {}
        self.reached: dict[str, _Gather] = {}
        self.stacks: dict[tuple[Any, ...], Origin] = {}

    def add(self, item: Route) -> None:
        if item.problem:
            self.problems.append(item.problem)
        elif isinstance(item.row, Drop):
            self._drop(item, item.row)
        elif isinstance(item.row, Rule) and item.match:
            self._send(item, item.row, item.match)

    def _drop(self, item: Route, row: Drop) -> None:
        self.drops[item.spec.name] = row
        if row.buffer and item.match:
            (name,) = row.buffer.render(item.match.captures)
            there: tuple[int, ...] = ()
            with suppress(OpError, KeyError):
                parts = len(row.pattern.choices) or 1
                there = row.ops.shapes([self.skeleton.buffers[name]], parts)[item.match.choice]
            if there != item.spec.shape:
                detail = f"{size_of(item.spec.shape)} here, {size_of(there)} in timm"
                self.problems.append(Problem("shape", item.spec.name, item.spec, (row,), detail))

    def _send(self, item: Route, rule: Rule, match: Match) -> None:
        name, spec = item.spec.name, item.spec
        try:
            names, ops = follow(self.mapping, item, self.existing, self.numbered)
        except Homeless as error:
            self.problems.append(Problem("nowhere", name, spec, (rule,), str(error)))
            return
        if absent := [target for target in names if target not in self.skeleton.specs]:
            self.problems.append(Problem("nowhere", name, spec, (rule,), target=absent[0]))
            return
        mine = _Gather(rule, names, ops, match.captures, item.layer)
        for target in names:
            there = self.reached.get(target, mine)
            if there != mine or match.choice in there.members or names.count(target) > 1:
                self.problems.append(_clash(item, rule, target, there))
                return
        for target in names:
            there = self.reached.setdefault(target, mine)
        there.members[match.choice] = spec

    def close(self) -> Plan | tuple[Problem, ...]:
        gathers = {id(gather): gather for gather in self.reached.values() if gather.members}
        steps = [step for gather in gathers.values() for step in self._steps(gather)]
        absent: dict[tuple[str, int | float | str], list[str]] = {}
        for name, spec in self.skeleton.specs.items():
            if name in self.reached:
                continue
            fills, _ = most_specific(self.mapping.fill, split(name))
            if len(fills) != 1:
                self.problems.append(Problem("tie" if fills else "missing", name, spec, tuple(fills)))
            elif not isinstance(fills[0].value, int) and spec.kind != "float":
                self.problems.append(Problem("dtype", name, spec, tuple(fills), f"{spec.dtype} in timm"))
            else:
                steps.append(Step(spec, Origin(fill=fills[0].value)))
                if fills[0].reason:
                    absent.setdefault((fills[0].reason, fills[0].value), []).append(name)
        if self.problems:
            return tuple(self.problems)
        caveats = (
            f"{', '.join(text for text, _ in fold(names))} {'is' if len(names) == 1 else 'are'} {value}: {reason}"
            for (reason, value), names in absent.items()
        )
        return Plan(self.mapping, self.skeleton, tuple(steps), self.drops, tuple(caveats))

    def _steps(self, gather: _Gather) -> list[Step]:
        """The steps of one gather, or none and a problem for each of its targets."""
        words, names = gather.rule.pattern.choices, gather.names
        sources = [gather.members[choice] for choice in sorted(gather.members)]
        wanted = [self.skeleton.specs[name] for name in names]

        def fail(kind: str, detail: str) -> list[Step]:
            self.problems.extend(Problem(kind, spec.name, spec, (gather.rule,), detail) for spec in wanted)
            return []

        if len(sources) < len(words):
            absent = ", ".join(word for choice, word in enumerate(words) if choice not in gather.members)
            return fail("incomplete", f"the source has no {absent}")
        try:
            shapes = gather.ops.shapes([spec.shape for spec in sources], len(names))
        except OpError as error:
            return fail("op", str(error))
        if any(spec.shape != shape for spec, shape in zip(wanted, shapes, strict=True)):
            for spec, shape in zip(wanted, shapes, strict=True):
                detail = f"{size_of(shape)} from {sources[0].name}, {size_of(spec.shape)} in timm"
                self.problems.append(Problem("shape", spec.name, spec, (gather.rule,), detail, shape=shape))
            return []
        for spec in sources:
            if spec.dtype != sources[0].dtype:
                return fail("dtype", f"{spec.dtype} from {spec.name}, {sources[0].dtype} from {sources[0].name}")
            if spec.kind != wanted[0].kind:
                return fail("dtype", f"{spec.dtype} from {spec.name}, {wanted[0].dtype} in timm")
        origin, part = Origin(tuple(s.name for s in sources), gather.ops, gather.rule, parts=len(names)), 0
        if layers := gather.layer[1]:  # of stacks, which are read once
            whole = replace(origin, ops=gather.ops.each(), parts=len(names) * layers)
            origin = self.stacks.setdefault((whole.sources, whole.ops, whole.parts), whole)
            part = len(names) * gather.layer[0]
        return [
            Step(TensorSpec(spec.name, spec.shape, sources[0].dtype), origin, place)
            for place, spec in enumerate(wanted, part)
        ]


def _clash(item: Route, rule: Rule, target: str, there: _Gather) -> Problem:
    """The problem of a source whose target is taken, or that does not fit the other parts of its gather."""
    rows = (rule,) if there.rule is rule else (there.rule, rule)
    other = next(iter(there.members.values()), item.spec).name
    detail = f"{target} comes from {other} too"
    if there.rule is rule and item.match and item.match.choice not in there.members:
        detail = f"its indices or ops are not those of {other}"
    return Problem("clash", item.spec.name, item.spec, rows, detail)
