"""The zoo: every family that ships, against its source framework, as `timmport check` has it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from converters.checking import Case, check
from converters.mapping import Mapping, find_mappings
from converters.verifier.worker import Workers

COVERAGE = Path(__file__).parents[2] / "tools" / "coverage"
GOOD = {"exact", "nearly", "closes", "refused", "no reference"}
pytestmark = pytest.mark.alone


@pytest.mark.parametrize("family", find_mappings())
def test_a_family(family: str, workers: Workers) -> None:
    """Lint, closing on every target, and on the smallest of each reference parity, with mutants that must fail."""
    found = check(family, workers=workers)
    assert [f"line {one.line}: {one.problem}" for one in found.findings if one.severity == "error"] == []
    shown = shown_before(found.mapping)
    good = GOOD | {"not installed"} if {"exact", "nearly"} & set(shown.values()) else GOOD
    bad = [case for case in found.cases if case.outcome not in good or weaker(case, shown)]
    assert [(case.target, case.runner, case.outcome, case.detail) for case in bad] == []
    for proof in (case.verdict.mutants for case in found.cases if case.outcome in ("exact", "nearly")):
        assert len({mutant.kind for mutant in proof.mutants}) >= 4 and proof.smallest_margin > 1


def shown_before(mapping: Mapping) -> dict[tuple[str, str], str]:
    """What has been shown of this very mapping, by target and runner; where a framework is not installed, it has to do.

    Of several references of a runner's, the weakest of what was compared.
    """
    sha256 = hashlib.sha256(mapping.path.read_bytes()).hexdigest()
    path = COVERAGE / f"{mapping.name}.json"
    rows = json.loads(path.read_text("utf-8")) if path.is_file() else []
    rows = [row for row in rows if row["family_sha256"] == sha256]
    ranked = sorted(rows, key=lambda row: (row["outcome"] == "nearly", row["outcome"] == "exact"))
    return {(row["target"], row["reference"].partition(",")[0]): row["outcome"] for row in ranked}


def weaker(case: Case, shown: dict[tuple[str, str], str]) -> bool:
    """Whether what was exact is no more: float64 is lost without a sound."""
    return case.outcome == "nearly" and shown.get((case.target, case.runner)) == "exact"
