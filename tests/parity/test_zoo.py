"""The zoo: every family that ships, against its source framework, as `timmport check` has it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from converters.checking import check
from converters.mapping import find_mappings
from converters.verifier.worker import Workers

COVERAGE = Path(__file__).parents[2] / "tools" / "coverage"
GOOD = {"exact", "nearly", "closes", "refused", "no reference"}
pytestmark = pytest.mark.alone


@pytest.fixture(scope="session")
def workers() -> Iterator[Workers]:
    with Workers() as kept:
        yield kept


@pytest.mark.parametrize("family", find_mappings())
def test_a_family(family: str, workers: Workers) -> None:
    """Lint, closing on every target, and on the smallest of each reference parity, with mutants that must fail."""
    found = check(family, workers=workers)
    assert [f"line {one.line}: {one.problem}" for one in found.findings if one.severity == "error"] == []
    good = GOOD | {"not installed"} if proved_elsewhere(family) else GOOD
    assert [
        (case.target, case.runner, case.outcome, case.detail) for case in found.cases if case.outcome not in good
    ] == []


def proved_elsewhere(family: str) -> bool:
    """Whether its parity has been shown; where a framework is not installed, that has to do."""
    rows = json.loads((COVERAGE / f"{family}.json").read_text("utf-8"))
    return any(row["outcome"] in ("exact", "nearly") for row in rows)
