"""Taps: which modules of the source and of timm must give the same, read off the plan.

A row that maps one module to another says so of that pair, and of every pair below it whose names are carried. It
holds where both modules have the same tensors: a stage that begins with what the source's ends with is no pair.
The mapping's `taps:` say where a source module's counterpart lies differently:

    block_{n}_expand_BN:  block_{n}_expand_relu              timm's gives what this one gives
    stages.{i}:           stages.{i} | b h w c -> b (h w) c  timm's, so laid out, is the source's; if of that rank
    layer{i}.bn2:         none                               timm's gives what no module of the source gives
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping as Dict
from dataclasses import asdict, dataclass
from typing import Any

from converters.mapping import Mapping
from converters.names import split
from converters.ops import IDENTITY, Pipeline
from converters.plan import Plan, Step
from converters.rows import most_specific
from converters.tensors import TensorSpec

__all__ = ["Pair", "pair_modules", "read_pairs"]


@dataclass(frozen=True)
class Pair:
    """A module of timm and its counterpart; names are the family's, without its prefixes and with dots."""

    target: str
    source: str
    line: int  # of the row
    output: str  # the source module whose output is the target's
    layout: str = ""  # ops that lay the target's activations out as the source's
    order: str = ""  # the row's ops on the weight, where they keep its shape: they may permute channels

    def to_json(self) -> dict[str, Any]:
        """What is not plain, under short names; the target is the key in conversion.json."""
        found = {"from": self.source, **asdict(self), "output": self.output if self.output != self.source else ""}
        return {key: value for key, value in found.items() if value and key not in ("target", "source")}


def read_pairs(modules: Any) -> tuple[Pair, ...]:
    """The pairs of a conversion.json. Raises ValueError, TypeError, KeyError or AttributeError."""
    pairs = []
    for target, row in modules.items():
        layout, order = (Pipeline.parse(str(row.get(key, ""))).text for key in ("layout", "order"))
        output = str(row.get("output") or row["from"])
        pairs.append(Pair(str(target), str(row["from"]), int(row["line"]), output, layout, order))
    return tuple(pairs)


def pair_modules(plan: Plan, specs: Dict[str, TensorSpec]) -> tuple[Pair, ...]:
    """Every pair that the plan's rows make, in order of the target's names. Raises MappingError."""
    pairs: dict[tuple[str, str], list[Step]] = {}
    here, there = dict[str, set[str]](), dict[str, set[str]]()  # module: the targets of its tensors
    names = plan.mapping.segments(specs)
    for step in plan.steps:
        if step.origin.rule:
            for name in step.origin.sources:
                _note(here, names[name], step)
            _note(there, split(step.target.name), step)
            for pair in _carried(names[step.origin.sources[0]], step):
                pairs.setdefault(pair, []).append(step)
    found = []
    for (source, target), steps in sorted(pairs.items(), key=lambda item: item[0][1]):
        rule = steps[0].origin.rule
        if rule and here[source] == there[target] and (tap := _tapped(plan.mapping, source)):
            output, layout = tap
            weights = [step for step in steps if step.target.name == f"{target}.weight"]
            order = "".join(_order(step, specs) for step in weights)
            found.append(Pair(target, source, rule.line, output, layout, order))
    return tuple(found)


def _note(modules: dict[str, set[str]], name: tuple[str, ...], step: Step) -> None:
    for end in range(1, len(name)):
        modules.setdefault(".".join(name[:end]), set()).add(step.target.name)


def _carried(source: tuple[str, ...], step: Step) -> Iterator[tuple[str, str]]:
    """The modules around a tensor, from the one that its row names down to its own."""
    rule = step.origin.rule
    assert rule
    target = split(step.target.name)
    match = rule.pattern.match(source)
    if match is None or step.origin.parts > 1 or len(step.origin.sources) > 1:
        return
    rest = match.rest
    if rest[:-1] != target[len(target) - len(rest) : -1]:
        return
    for depth in range(len(rest), 0, -1):
        yield ".".join(source[: len(source) - depth]), ".".join(target[: len(target) - depth])


def _tapped(mapping: Mapping, source: str) -> tuple[str, str] | None:
    """The module whose output counts, and the layout, by the mapping's `taps:`; None where they say `none`."""
    rows, match = most_specific(mapping.taps, split(source))
    if not rows or not match:
        return source, ""
    if len(rows) > 1:
        lines = " and ".join(str(row.line) for row in rows)
        raise mapping.lines.error(f"taps in lines {lines} match {source} alike", "taps", rows[0].pattern.text)
    (way,) = rows[0].ways
    (name,) = way.template.render(match.captures)
    if name == "none":
        return None
    return ".".join((*split(name), *match.rest)), way.ops.text


def _order(weight: Step, specs: Dict[str, TensorSpec]) -> str:
    """The row's own ops, which come behind those of the leaf's layout, if they only move what a weight has."""
    rule, ops = weight.origin.rule, weight.origin.ops.ops
    shapes = [specs[name].shape for name in weight.origin.sources]
    for way in rule.ways if rule else ():
        before = len(ops) - len(way.ops.ops)
        if way.ops != IDENTITY and ops[before:] == way.ops.ops:
            laid_out = Pipeline(ops[:before]).shapes(shapes)
            moving = Pipeline(tuple(op for op in way.ops.ops if op.invert))
            return moving.text if laid_out == [weight.target.shape] else ""
    return ""
