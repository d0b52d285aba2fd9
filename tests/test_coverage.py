"""COVERAGE.md says something of everything in mappings/, and what tools/coverage/ holds."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from converters.checking import Case, Check
from converters.mapping import find_mappings, load_mapping

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def coverage() -> Any:
    spec = spec_from_file_location("coverage_table", ROOT / "tools" / "coverage.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_results_say(coverage) -> None:
    assert (ROOT / "COVERAGE.md").read_text("utf-8") == coverage.render(coverage.read_results())


@pytest.mark.parametrize("family", [name for name in find_mappings() if load_mapping(name).target_names])
def test_every_target_has_its_row(coverage, family: str) -> None:
    mapping = load_mapping(family)
    rows = coverage.read_results()[family]
    assert {row["family"] for row in rows} <= {family}
    assert {row["target"] for row in rows} == set(mapping.target_names), f"run tools/coverage.py {family}"
    assert {row["outcome"] for row in rows} <= {"exact", "nearly", "closes", "no reference"}
    if mapping.references:
        runners = {row["reference"].split(",")[0] for row in rows if row["outcome"] in ("exact", "nearly")}
        assert runners == {reference.runner for reference in mapping.references}


def test_no_file_is_of_a_family_that_is_gone(coverage) -> None:
    files = coverage.RESULTS.glob("*/*.json")
    assert {path.relative_to(coverage.RESULTS).with_suffix("").as_posix() for path in files} <= set(find_mappings())


def row(outcome: str, sha256: str = "a", target: str = "t", **more: Any) -> dict[str, Any]:
    return {"family": "f", "line": 1, "target": target, "outcome": outcome, "family_sha256": sha256, **more}


@pytest.mark.parametrize(
    ("old", "new", "kept"),
    [
        ([], [row("closes")], ["closes"]),
        ([row("exact")], [row("closes")], ["exact"]),
        ([row("exact")], [row("closes", sha256="b")], ["closes"]),  # of another mapping
        ([row("exact")], [row("failed")], ["failed"]),
        ([row("closes")], [row("exact")], ["exact"]),
        (
            [row("exact"), row("closes", target="u")],
            [row("not installed"), row("not installed", target="u")],
            ["exact", "closes"],
        ),
        ([row("exact")], [row("not installed", sha256="b")], ["not installed"]),
        ([row("exact"), row("exact", target="u")], [row("closes")], ["exact"]),  # a target that is gone
    ],
)
def test_what_was_shown_is_kept_while_its_mapping_is(coverage, old: list, new: list, kept: list[str]) -> None:
    assert [one["outcome"] for one in coverage.merge(old, new)] == kept


def test_a_run_that_was_stopped_goes_on(coverage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was proved before it was stopped is written, and is not proved again."""
    closing = [
        Case("resnet18", "closes", "timm", 9, parameters=9),
        Case("resnet34", "closes", "timm", 9, parameters=99),
    ]
    asked: list[tuple[str, bool]] = []

    def check(family: str, *, parity: Any, proved: Any, **how: Any) -> Check:
        for case, mutants in zip(closing, (True, False), strict=True):
            if parity(case, mutants):
                asked.append((case.target, mutants))
                proved(replace(case, outcome="exact"))
                if len(asked) == stop:
                    raise KeyboardInterrupt
        return Check(load_mapping(family), (), tuple(closing))

    monkeypatch.setattr(coverage, "check", check)
    monkeypatch.setattr(coverage, "RESULTS", tmp_path)
    stop = 1
    with pytest.raises(KeyboardInterrupt):
        coverage.run_one("mmlab/resnet", 100)
    assert [row["target"] for row in coverage.read_results()["mmlab/resnet"]] == ["resnet18"]
    coverage.run_one("mmlab/resnet", 10)  # resnet34 is larger, and resnet18's mutants are not there yet
    coverage.run_one("mmlab/resnet", 100)
    assert asked == [("resnet18", True), ("resnet18", True), ("resnet18", True), ("resnet34", False)]
    assert [row["outcome"] for row in coverage.read_results()["mmlab/resnet"]] == ["exact", "exact"]
