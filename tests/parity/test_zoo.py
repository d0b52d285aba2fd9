"""The zoo: every family that ships, against its source framework, as `timmport check` has it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from converters.checking import check
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
    good = GOOD | {"not installed"} if proved_elsewhere(found.mapping) else GOOD
    bad = [case for case in found.cases if case.outcome not in good]
    assert [(case.target, case.runner, case.outcome, case.detail) for case in bad] == []
    for proof in (case.verdict.mutants for case in found.cases if case.outcome in ("exact", "nearly")):
        assert len({mutant.kind for mutant in proof.mutants}) >= 4 and proof.smallest_margin > 1


def proved_elsewhere(mapping: Mapping) -> bool:
    """Whether the parity of this very mapping has been shown; where a framework is not installed, that has to do."""
    sha256 = hashlib.sha256(mapping.path.read_bytes()).hexdigest()
    path = COVERAGE / f"{mapping.name}.json"
    rows = json.loads(path.read_text("utf-8")) if path.is_file() else []
    return any(row["outcome"] in ("exact", "nearly") and row["family_sha256"] == sha256 for row in rows)
