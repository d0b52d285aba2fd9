"""COVERAGE.md says something of everything in mappings/, and what tools/coverage/ holds."""

from __future__ import annotations

from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

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
    return {"family": "f", "reference": "r", "target": target, "outcome": outcome, "family_sha256": sha256, **more}


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
