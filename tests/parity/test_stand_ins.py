"""Families whose source code no package index has, against stand-ins under that code's names (see tests/stand_ins).

What was shown against the code itself is in COVERAGE.md.
"""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from converters.cli import app

STAND_INS = Path(__file__).parents[1] / "stand_ins"


def test_vision_transformer(monkeypatch) -> None:
    """Both ways in which Flax has named the parts of a block."""
    monkeypatch.setenv("PYTHONPATH", str(STAND_INS))
    words = ["check", "jax/vision_transformer", "--to", "vit_tiny_patch16_224", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output or done.exception
    (document,) = json.loads(done.stdout)
    assert [case["outcome"] for case in document["cases"]] == ["exact", "exact"]
