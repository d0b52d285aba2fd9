"""Plans: where every target tensor comes from, decided on names and shapes alone.

`route` asks the mapping about every source; it knows no target and is done once. `make_plan` brings the
routes to one target and returns a plan that closes, or every problem that keeps it from closing.
"""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, field
from typing import Any

from converters.mapping import Drop, Leaf, Mapping, Rule, Way, When
from converters.names import Match, Template, prefixes, split
from converters.ops import IDENTITY, OpError, Pipeline
from converters.target import Skeleton, Traits
from converters.tensors import TensorSpec

__all__ = ["Origin", "Plan", "Problem", "Route", "Step", "make_plan", "read_off", "route"]


@dataclass(frozen=True)
class Origin:
    """Where tensors come from: sources through ops by a rule, or a constant."""

    sources: tuple[str, ...] = ()
    ops: Pipeline = IDENTITY
    rule: Rule | None = None
    fill: int | float | None = None
    parts: int = 1  # how many targets it gives


@dataclass(frozen=True)
class Step:
    """One target tensor: its spec as it will be written, and its origin."""

    target: TensorSpec
    origin: Origin
    part: int = 0  # which of the origin's results


@dataclass(frozen=True)
class Plan:
    """A conversion that closes."""

    mapping: Mapping
    skeleton: Skeleton
    steps: tuple[Step, ...]
    drops: dict[str, Drop]  # source name: the row that discards it
    caveats: tuple[str, ...] = ()  # what the file cannot rule out; to be shown

    @property
    def origins(self) -> dict[int, list[Step]]:
        """Steps that share an origin, by the origin's identity: a scatter is read and computed once."""
        grouped: dict[int, list[Step]] = {}
        for step in self.steps:
            grouped.setdefault(id(step.origin), []).append(step)
        return grouped


@dataclass(frozen=True)
class Problem:
    """One reason why a plan does not close."""

    kind: str  # a key of diagnosis.KINDS
    name: str  # the source or target that it is about
    spec: TensorSpec
    rows: tuple[Rule | Drop, ...] = ()
    detail: str = ""
    target: str = ""  # for a source that a rule sends nowhere: the name that the target lacks


@dataclass(frozen=True)
class Route:
    """What the mapping says of one source."""

    spec: TensorSpec
    segments: tuple[str, ...]  # its name, stripped of the family's prefixes
    row: Rule | Drop | None
    match: Match | None
    problem: Problem | None = None


def route(mapping: Mapping, specs: Dict[str, TensorSpec]) -> tuple[Route, ...]:
    """Each source's most specific row."""
    routes, taken = [], dict[tuple[str, ...], str]()
    for name, spec in specs.items():
        segments = mapping.stripped(name)
        rows, match = mapping.best_row(segments)
        problem = None
        if other := taken.get(segments):
            problem = Problem("twice", name, spec, detail=f"it and {other} are one name without their prefix")
        elif len(rows) > 1:
            problem = Problem("tie", name, spec, tuple(rows))
        elif not rows:
            problem = Problem("unmatched", name, spec)
        taken[segments] = name
        routes.append(Route(spec, segments, rows[0] if rows else None, match, problem))
    return tuple(routes)


def read_off(mapping: Mapping, routes: tuple[Route, ...], traits: Traits) -> dict[str, int]:
    """The classes and input channels that the source itself has, as timm arguments."""
    shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
    sources = prefixes(item.segments for item in routes)
    for item in routes:
        if item.problem or not isinstance(item.row, Rule):
            continue
        try:
            names, ops = _destination(mapping, item, _Existing(frozenset(), sources), {})
            shape = ops.shapes([item.spec.shape], len(names))[0]
        except (KeyError, OpError, _Homeless):
            continue  # a gather's member, or a row that needs the target; neither is a classifier or a stem
        shapes.update((split(name), shape) for name in names)
    args: dict[str, int] = {}
    classes = [shape[0] for name in traits.classifiers if (shape := shapes.get((*split(name), "weight")))]
    channels = [shape[1] for name in traits.first_convs if len(shape := shapes.get((*split(name), "weight"), ())) == 4]
    if traits.classifiers and (classes or traits.num_classes) != [traits.num_classes]:
        args["num_classes"] = classes[0] if classes else 0
    if channels and channels[0] != traits.in_chans:
        args["in_chans"] = channels[0]
    return args


def make_plan(mapping: Mapping, routes: tuple[Route, ...], skeleton: Skeleton) -> Plan | tuple[Problem, ...]:
    """The plan for one target, or every problem that keeps it from closing."""
    draft = _Draft(mapping, skeleton, routes)
    for item in routes:
        draft.add(item)
    return draft.close()


class _Homeless(Exception):
    """A route that this target gives no place; the text says why."""


@dataclass(frozen=True)
class _Existing:
    """What `when:` can ask for."""

    target: frozenset[tuple[str, ...]]
    source: frozenset[tuple[str, ...]]

    def holds(self, when: When | None, captures: dict[str, Any]) -> bool:
        asked = [] if when is None else [(when.source, self.source), (when.target, self.target)]
        return all(
            split(name) in there for text, there in asked if text for name in Template.parse(text).render(captures)
        )


@dataclass
class _Gather:
    """Sources on their way to the same targets."""

    rule: Rule
    ops: Pipeline
    members: dict[int, TensorSpec] = field(default_factory=dict)


class _Draft:
    """A plan while routes are brought to it."""

    def __init__(self, mapping: Mapping, skeleton: Skeleton, routes: tuple[Route, ...]) -> None:
        self.mapping, self.skeleton = mapping, skeleton
        self.existing = _Existing(skeleton.modules, prefixes(item.segments for item in routes))
        self.numbered = {key: skeleton.number(pattern) for key, pattern in mapping.enumerate.items()}
        self.problems: list[Problem] = []
        self.drops: dict[str, Drop] = {}
        self.gathers: dict[tuple[str, ...], _Gather] = {}

    def add(self, item: Route) -> None:
        if item.problem:
            self.problems.append(item.problem)
        elif isinstance(item.row, Drop):
            self.drops[item.spec.name] = item.row
        elif isinstance(item.row, Rule) and item.match:
            self._send(item, item.row, item.match)

    def _send(self, item: Route, rule: Rule, match: Match) -> None:
        name, spec = item.spec.name, item.spec
        try:
            names, ops = _destination(self.mapping, item, self.existing, self.numbered)
        except _Homeless as error:
            self.problems.append(Problem("nowhere", name, spec, (rule,), str(error)))
            return
        if absent := [target for target in names if target not in self.skeleton.specs]:
            self.problems.append(Problem("nowhere", name, spec, (rule,), target=absent[0]))
            return
        gather = self.gathers.setdefault(names, _Gather(rule, ops))
        if gather.rule is not rule or match.choice in gather.members:
            other = next(iter(gather.members.values())).name
            self.problems.append(
                Problem("clash", name, spec, (gather.rule, rule), f"{names[0]} comes from {other} too")
            )
            return
        gather.members[match.choice] = spec

    def close(self) -> Plan | tuple[Problem, ...]:
        steps = [step for names, gather in self.gathers.items() for step in self._steps(names, gather)]
        reached = {name for names in self.gathers for name in names}
        for name, spec in self.skeleton.specs.items():
            if name in reached:
                continue
            values = [value for pattern, value in self.mapping.fill if pattern.match(split(name))]
            if values:
                steps.append(Step(spec, Origin(fill=values[0])))
            else:
                self.problems.append(Problem("missing", name, spec))
        if self.problems:
            return tuple(self.problems)
        return Plan(self.mapping, self.skeleton, tuple(steps), self.drops)

    def _steps(self, names: tuple[str, ...], gather: _Gather) -> list[Step]:
        """The steps of one gather, or none and a problem for each of its targets."""
        words = gather.rule.pattern.choices
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
        for spec, shape in zip(wanted, shapes, strict=True):
            if spec.shape != shape:
                return fail("shape", f"{_x(shape)} from {sources[0].name}, {_x(spec.shape)} in timm")
        if _is_float(sources[0].dtype) != _is_float(wanted[0].dtype):
            return fail("dtype", f"{sources[0].dtype} from {sources[0].name}, {wanted[0].dtype} in timm")
        origin = Origin(tuple(s.name for s in sources), gather.ops, gather.rule, parts=len(names))
        return [
            Step(TensorSpec(spec.name, spec.shape, sources[0].dtype), origin, part) for part, spec in enumerate(wanted)
        ]


def _destination(
    mapping: Mapping, item: Route, existing: _Existing, numbered: dict[str, list[dict[str, Any]]]
) -> tuple[tuple[str, ...], Pipeline]:
    """The target names that a route leads to, and its ops. Raises _Homeless, or KeyError without the numbering."""
    assert isinstance(item.row, Rule) and item.match
    captures = dict(item.match.captures)
    for key in mapping.enumerate:
        if key in captures and key in numbered:
            modules = numbered[key]
            if captures[key] >= len(modules):
                raise _Homeless(f"the target has only {len(modules)} of {mapping.enumerate[key].text}")
            captures |= modules[captures[key]]
    way = _way(item.row, captures, existing)
    names = way.template.render(captures)
    if not item.match.rest:
        return names, way.ops
    leaf = _leaf(mapping, item)
    tail = ".".join((*item.match.rest[:-1], leaf.name))
    return tuple(f"{name}.{tail}" for name in names), leaf.ops + way.ops


def _way(rule: Rule, captures: dict[str, Any], existing: _Existing) -> Way:
    for way in rule.ways:
        if existing.holds(way.when, captures):
            return way
    raise _Homeless("no way of this row has a guard that holds")


def _leaf(mapping: Mapping, item: Route) -> Leaf:
    assert item.match
    leaf, rank = item.match.rest[-1], len(item.spec.shape)
    ways = mapping.leaves.get(leaf)
    if ways is None:
        return Leaf(leaf, IDENTITY, None)
    for way in ways:
        if way.rank in (None, rank):
            return way
    raise _Homeless(f"leaves.yaml has no layout for a `{leaf}` of rank {rank}")


def _is_float(dtype: str) -> bool:
    return dtype.startswith(("float", "bfloat", "complex"))


def _x(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"
