"""Findings, by the lines of the file; the text of each family starts at line 4 (see conftest.py)."""

from __future__ import annotations

import pytest

from converters.lint import lint_closings, lint_file
from converters.mapping import find_mappings, load_mapping
from converters.plan import Plan, make_plan
from converters.routes import route
from converters.target import Skeleton
from converters.verifier.references.__main__ import RUNNERS

REFERENCE = "reference:\n  runner: {}\n  model: {}\n  outputs: {}\n"


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("rules:\n  a.{i}.b: c.{i}\n  a.{j}.b: d.{j}\n", 6, "`a.{j}.b` ties with line 5 on `a.0.b`"),
        ("rules:\n  stem*: x\n  '{*}stem': y\n", 6, "`{*}stem` ties with line 5 on `stem`"),
        ("rules: {}\nfill:\n  '**.bias': 0\n  '**.{b|bias}': 1\n", None, ""),
        ("rules: {}\nfill:\n  '**.bias': 0\n  '*.*.bias': 1\n", 7, "`*.*.bias` ties with line 6 on `x.x.bias`"),
        ("rules:\n  head: fc\ndrop:\n  head: not wanted\n", 7, "`head` ties with line 5 on `head`"),
        ("rules:\n  layer{s}: a\n  layer0: b\n  layer{s}.0: c\n", None, ""),
        (
            "rules: {}\n" + REFERENCE.format("mmdetection", "{}", "{logits: '0'}"),
            6,
            "no runner is called",
        ),
        ("rules: {}\n" + REFERENCE.format("mmdet", "{}", "{features: '0'}"), 8, "timm has no output `features`"),
        (
            "rules: {}\n" + REFERENCE.format("mmdet", "{depth: $deth, a: [$img_size]}", "{logits: '0'}"),
            7,
            "`$deth` is no value of any target, and is left out",
        ),
        ("rules: {}\nreference:\n  - {runner: one, model: {}, outputs: {}}\n", 6, "no runner is called `one`"),
        ("rules: {}\ntarget_args: {pad: 1}\n", 1, "timm's resnet18 does not take pad=1"),
    ],
)
def test_what_the_file_alone_shows(family, text: str, line: int | None, words: str) -> None:
    findings = lint_file(family(text), RUNNERS)
    assert [finding.line for finding in findings] == ([line] if line else [])
    assert all(words in finding.problem and finding.severity == "error" for finding in findings)


@pytest.mark.parametrize(
    ("head", "words"), [("resnet19", "timm {} has no model `resnet19`; did you mean"), ("resnet18", None)]
)
def test_targets_that_timm_lacks(family, head: str, words: str | None) -> None:
    import timm

    findings = lint_file(family("rules: {}\n", f"targets:\n  {head}:\ndetect: ['*']\nleaves: torch\n"), RUNNERS)
    assert [finding.line for finding in findings] == ([2] if words else [])
    assert not words or findings[0].problem.startswith(words.format(timm.__version__))


@pytest.mark.parametrize(
    ("text", "sources", "targets", "found"),
    [
        ("rules:\n  a: x\n", "a.w=2", "x.w=2", []),
        ("rules:\n  a: x\n  b: y\n", "a.w=2", "x.w=2", ["6 warning rule `b` takes nothing"]),
        ("rules:\n  a: x\n  a.{*}: x.{*}\n", "a.w=2", "x.w=2", ["5 error rule `a` never wins: line 6 "]),
        ("rules:\n  a{k}: x{k}\n  a0: x0\n", "a0.w=2", "x0.w=2", ["5 warning rule `a{k}` takes nothing"]),
        ("rules:\n  a: x\ndrop:\n  b: why\n  z: why\n", "a.w=2 b.w=2", "x.w=2", ["8 warning drop `z` takes nothing"]),
        (
            "rules:\n  a: x\nfill:\n  '**.n': 0\n  y: 0\n",
            "a.w=2",
            "x.w=2 y.w=2",
            ["7 warning fill `**.n: 0` is needed by no target"],
        ),
    ],
)
def test_what_checkpoints_show(family, specs, text: str, sources: str, targets: str, found: list[str]) -> None:
    mapping = family(text)
    routes = route(mapping, specs(sources))
    plan = make_plan(mapping, routes, Skeleton("tiny", {}, specs(targets), None))
    assert isinstance(plan, Plan)
    findings = lint_closings(mapping, [(routes, plan)])
    told = [f"{one.line} {one.severity} {one.problem}" for one in findings]
    assert len(told) == len(found) and all(map(str.startswith, told, found)), told


def test_detect_names_that_are_nowhere(family, specs) -> None:
    head = "targets: {resnet18: }\ndetect:\n  - a\n  - [b, a.w]\nleaves: torch\n"
    mapping = family("rules: {a: x}\n", head)
    (finding,) = lint_closings(mapping, [(route(mapping, specs("a.w=2")), None)])
    assert (finding.line, finding.severity) == (4, "warning") and "`b` is in none" in finding.problem


@pytest.mark.parametrize("name", find_mappings())
def test_what_ships_has_no_errors(name: str) -> None:
    assert lint_file(load_mapping(name), RUNNERS) == []
