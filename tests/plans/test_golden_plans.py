"""Every family's plans, against text that a person has read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from difflib import unified_diff
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from converters.mapping import find_mappings, load_mapping

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def golden() -> Iterator[Any]:
    spec = spec_from_file_location("write_golden_plans", HERE.parents[1] / "tools" / "write_golden_plans.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FAMILIES = [name for name in find_mappings() if load_mapping(name).any_target or load_mapping(name).targets]


@pytest.mark.parametrize("family", FAMILIES)
def test_plans_are_the_golden_ones(golden, family):
    plans = list(golden.plans_of(HERE / f"{family}.specs.json"))
    found = "\n".join(f"{title}: {golden.plan_text(plan)}" for title, plan in plans).splitlines()
    expected = (HERE / f"{family}.txt").read_text("utf-8").splitlines()
    assert found == expected, "\n".join(unified_diff(expected, found, "golden", "found", n=0, lineterm=""))
    assert {plan.mapping.name for _, plan in plans} == {family}


def test_every_golden_file_has_its_family():
    stems = {path.relative_to(HERE).with_suffix("").as_posix() for path in HERE.glob("*/*.txt")}
    assert stems == set(FAMILIES)


def test_two_crossed_targets_do_not_pass(golden):
    """Folding hides which index went where; the digest does not."""
    _, plan = next(iter(golden.plans_of(HERE / "timm/native.specs.json")))
    steps = {step.target.name: step for step in plan.steps}
    one, other = steps["blocks.3.norm1.weight"], steps["blocks.4.norm1.weight"]
    crossed = [replace(one, origin=other.origin), replace(other, origin=one.origin)]
    rest = [step for step in plan.steps if step not in (one, other)]
    before, after = golden.plan_text(plan), golden.plan_text(replace(plan, steps=(*rest, *crossed)))
    assert [a == b for a, b in zip(before.splitlines(), after.splitlines(), strict=True)].count(False) == 1
