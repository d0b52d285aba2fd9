"""Routes: what a mapping says of every source, and where that leads in a target."""

from __future__ import annotations

from collections.abc import Mapping as Dict
from dataclasses import dataclass, replace
from typing import Any

from converters.mapping import Mapping
from converters.names import Match, split
from converters.ops import IDENTITY, Pipeline
from converters.rows import Drop, Fill, Leaf, Numbered, Rule, Way, most_specific
from converters.tensors import TensorSpec

__all__ = ["Existing", "Homeless", "Problem", "Route", "follow", "route"]


@dataclass(frozen=True)
class Problem:
    """One reason why a plan does not close."""

    kind: str  # a key of diagnosis.KINDS
    name: str  # the source or target that it is about
    spec: TensorSpec
    rows: tuple[Rule | Drop | Fill, ...] = ()
    detail: str = ""
    target: str = ""  # for a source that a rule sends nowhere: the name that the target lacks
    shape: tuple[int, ...] = ()  # for a target of another shape: the one that its source would give


@dataclass(frozen=True)
class Route:
    """What the mapping says of one source, or of one layer of a stack."""

    spec: TensorSpec  # of a layer, under the stack's name
    segments: tuple[str, ...]  # its name, stripped of the family's prefixes; of a layer, what `unstack` calls it
    row: Rule | Drop | None
    match: Match | None
    problem: Problem | None = None
    own: tuple[str, ...] = ()  # its name, stripped; of a layer, the stack's
    layer: tuple[int, int] = (0, 0)  # which of how many; of none for what is no stack


def route(mapping: Mapping, specs: Dict[str, TensorSpec]) -> tuple[Route, ...]:
    """Each source's most specific row, and of a stack each layer's."""
    routes, taken = [], dict[tuple[str, ...], str]()
    for (name, own), spec in zip(mapping.segments(specs).items(), specs.values(), strict=True):
        layers = next(filter(None, (stack.layers(own, spec.shape) for stack in mapping.unstack)), [])
        inside = replace(spec, shape=spec.shape[1:]) if layers else spec
        for layer, segments in enumerate(layers or [own]):
            rows, match = most_specific(mapping.rows, segments)
            problem = None
            if other := taken.get(segments):
                problem = Problem("twice", name, spec, detail=f"it and {other} are one name without their prefix")
            elif len(rows) > 1:
                problem = Problem("tie", name, spec, tuple(rows))
            elif not rows:
                problem = Problem("unmatched", name, spec)
            taken[segments] = name
            row = rows[0] if rows else None
            routes.append(Route(inside, segments, row, match, problem, own, (layer, len(layers))))
    return tuple(routes)


class Homeless(Exception):
    """A route that this target gives no place; the text says why."""


@dataclass(frozen=True)
class Existing:
    """What `when:` can ask for."""

    target: frozenset[tuple[str, ...]]
    source: frozenset[tuple[str, ...]]

    def holds(self, way: Way, captures: dict[str, Any]) -> bool:
        asked = ((way.source, self.source), (way.target, self.target))
        return all(split(name) in there for guard, there in asked if guard for name in guard.render(captures))


def follow(
    mapping: Mapping, item: Route, existing: Existing, numbered: tuple[Numbered, ...]
) -> tuple[tuple[str, ...], Pipeline]:
    """The target names that a route leads to, and its ops. Raises Homeless, or KeyError without the numbering."""
    assert isinstance(item.row, Rule) and item.match
    captures: dict[str, Any] = dict(item.match.captures)
    for modules in numbered:
        captures |= modules.find(item.match.captures)
    try:
        way = _way(
            item.row,
            captures,
            existing,
            {field for one in numbered for module in one.modules.values() for field in module},
        )
        names = way.template.render(captures)
    except KeyError as error:
        counts = [f"the target has only {len(one.modules)} of {one.text}" for one in numbered]
        if not counts:
            raise
        raise Homeless(" and ".join(counts)) from error
    except ValueError as error:  # arithmetic on a word, a division by zero
        raise Homeless(str(error)) from error
    if not item.match.rest:
        return names, way.ops
    parents, leaf = _leaf(mapping, item.match.rest, len(item.spec.shape))
    tail = ".".join((*parents, leaf.name))
    return tuple(f"{name}.{tail}" for name in names), leaf.ops + way.ops


def _way(rule: Rule, captures: dict[str, Any], existing: Existing, numbered: set[str]) -> Way:
    """The first way whose guard holds, of those for the kind of module that was numbered."""
    for way in rule.ways:
        if not (way.template.fields - captures.keys()) & numbered and existing.holds(way, captures):
            return way
    raise Homeless("no way of this row has a guard that holds")


def _leaf(mapping: Mapping, rest: tuple[str, ...], rank: int) -> tuple[tuple[str, ...], Leaf]:
    """The modules before a leaf, and the leaf: the longest ending of the name that the layout has, or its last part."""
    for start in range(len(rest)):
        if ways := mapping.leaves.get("/".join(rest[start:])):
            for way in ways:
                if way.rank in (None, rank):
                    return rest[:start], way
            raise Homeless(f"leaves.yaml has no layout for a `{'/'.join(rest[start:])}` of rank {rank}")
    return rest[:-1], Leaf(rest[-1], IDENTITY, None)
