"""Plans as text: what comes from where, indices folded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

from converters.folding import fold
from converters.plan import Plan, Step

__all__ = ["Fold", "fold_plan", "plan_text"]


@dataclass(frozen=True)
class Fold:
    """Steps alike but for their numbers and last segments."""

    target: str
    sources: str  # or the value that fills it
    ops: str
    count: int
    lines: tuple[int, ...]  # of their rows

    def __str__(self) -> str:
        return f"{self.target} <- {self.sources}{f' | {self.ops}' if self.ops else ''}  ({self.count})"


def fold_plan(plan: Plan) -> Iterator[Fold]:
    """Every step of the plan, in its order."""
    groups: dict[tuple[str, ...], list[Step]] = {}
    for step in plan.steps:
        kind = (re.sub(r"[0-9]+", "#", re.sub(r"[./][^./]*$", "", name)) for name in _names(step))
        groups.setdefault((*kind, step.origin.ops.text), []).append(step)
    for steps in groups.values():
        columns = zip(*map(_names, steps), strict=True)
        target, *sources = (" ".join(text for text, _ in fold(names)) for names in columns)
        lines = sorted({step.origin.rule.line for step in steps if step.origin.rule})
        yield Fold(target, " + ".join(sources), steps[0].origin.ops.text, len(steps), tuple(lines))


def plan_text(plan: Plan) -> str:
    """A plan, folded: what comes from where, by which ops; drops and caveats; a digest of every line."""
    lines = [
        f"{step.target.name} <- {' + '.join(step.origin.sources)} | {step.origin.ops.text} [{step.part}]"
        if step.origin.fill is None
        else f"{step.target.name} <- {step.origin.fill}"
        for step in plan.steps
    ]
    lines += [f"{name}: {drop.reason}" for name, drop in plan.drops.items()]
    folded = [f"  {one}" for one in fold_plan(plan)]
    for reason in dict.fromkeys(drop.reason for drop in plan.drops.values()):
        names = fold(name for name, drop in plan.drops.items() if drop.reason == reason)
        folded += [f"  drop {text}: {reason}  ({count})" for text, count in names]
    folded += [f"  caveat: {caveat}" for caveat in plan.caveats]
    args = "".join(f", {key}={value}" for key, value in sorted(plan.skeleton.args.items()))
    digest = hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]
    head = f"{plan.mapping.name} -> {plan.skeleton.architecture}{args}"
    return "\n".join([head, *sorted(folded), f"  {len(lines)} lines, digest {digest}"]) + "\n"


def _names(step: Step) -> tuple[str, ...]:
    return step.target.name, *(step.origin.sources or [str(step.origin.fill)])
