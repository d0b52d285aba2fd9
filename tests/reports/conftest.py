"""Folders to report on: the demo's own, really verified, and what a verification adds when all of it is run."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BOUND = 1e-10
CULPRIT = 20  # the depth at which the made-up fault lies


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    """The demo's folder: 1,700 kB of weights, every document as timmport writes it."""
    from converters.demo import run_demo

    return run_demo(tmp_path_factory.mktemp("demo") / "mobilenet").conversion.directory


@pytest.fixture
def folder(demo, tmp_path) -> Path:
    """A copy to change."""
    return shutil.copytree(demo, tmp_path / "mobilenet")


@pytest.fixture
def change() -> Callable[..., None]:
    def rewrite(folder: Path, document: str = "verification.json", **keys: Any) -> None:
        path = folder / document
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **keys}), "utf-8")

    return rewrite


@pytest.fixture
def passing(folder, change) -> Path:
    """The demo with taps, mutants and an audit, all well."""
    change(folder, taps=taps(folder, None), mutants=mutants(0), audit=[])
    return folder


@pytest.fixture
def unproven(folder, change) -> Path:
    """The demo with a mutant that passed."""
    change(folder, outcome="unproven", mutants=mutants(1))
    return folder


@pytest.fixture
def failing(folder, change) -> Path:
    """The demo with a fault at `CULPRIT`."""
    found = taps(folder, CULPRIT)
    first = next(tap for tap in found if not tap["passed"])
    channels = [10.0 ** random.Random(channel).uniform(-13, -2) for channel in range(140)]
    comparison = json.loads((folder / "verification.json").read_text("utf-8"))["comparisons"][0]
    comparison |= {"passed": False, "reason": "error 3.2e-02 where 1.0e-10 is allowed (sample 3)"}
    comparison["sample_errors"][3] = 3.2e-2
    change(
        folder,
        passed=False,
        outcome="failed",
        summary=f"not the same function: logits on digits: {comparison['reason']}; the fault is in {first['target']}",
        comparisons=[comparison],
        taps=found,
        first_divergence={**first, "channels": [0.0, None, *channels]},
        culprit=first["target"],
        audit=[
            {
                "attribute": "eps",
                "kind": "BatchNorm2d",
                "source_value": 1e-3,
                "target_value": 1e-5,
                "modules": ["bn1", *(f"blocks.{stage}.{block}.bn1" for stage in range(7) for block in range(3))],
                "declared": None,
            },
            {
                "attribute": "padding",
                "kind": "Conv2d",
                "source_value": "same",
                "target_value": [0, 0],
                "modules": ["conv_stem"],
                "declared": "pad_type: same pads at run time",
            },
        ],
        mutants=mutants(0),
        unchecked=[{"source": "gap", "target": "global_pool", "line": 3, "reason": "timm runs no global_pool"}],
        warnings=["no float32: the framework says no"],
    )
    change(
        folder,
        "conversion.json",
        caveats=["The file does not say which variant was trained; this is the published one."],
        drops={f"neck.convs.{k}.conv.{leaf}": "neck of the detector" for k in range(4) for leaf in ("weight", "bias")},
        set_aside={"optimizer": "optimizer state", "ema": "averaged weights; --ema takes them"},
        preprocess={"mean": [0.485, 0.456, 0.406], "std": [0.5], "channels": "BGR"},
    )
    return folder


def taps(folder: Path, culprit: int | None) -> list[dict[str, Any]]:
    """Every module that has tensors."""
    tensors = json.loads((folder / "conversion.json").read_text("utf-8"))["tensors"]
    modules = {name.rpartition(".")[0]: origin for name, origin in tensors.items() if "from" in origin}
    chance, found = random.Random(0), []
    for depth, (target, origin) in enumerate(modules.items()):
        broken, checked = culprit is not None and depth >= culprit, depth != 40
        tap = {
            "source": origin["from"][0].rpartition("/")[0],
            "target": target,
            "line": origin["line"],
            "probe": "normal",
            "depth": depth,
            "error": chance.uniform(1, 9) * (1e-2 if broken else 1e-16 * depth),
            "bound": BOUND,
            "passed": not broken,
            "local_error": chance.uniform(1, 9) * (1e-3 if depth == culprit else 1e-16) if checked else None,
            "local_bound": 1e-13 if checked else None,
            "local_passed": depth != culprit if checked else None,
            "reason": None if checked else "not on the reference's own input: its first input in timm is no tensor",
        }
        found.append(tap)
    return found


def mutants(undetected: int) -> dict[str, Any]:
    kinds = ("channels swapped", "kernel transposed", "bias dropped", "eps times 100", "statistics of a neighbour")
    margins = [0.02] * undetected + [3e2, 4.1e4, 8e6, 3e8, None][undetected:]
    rows = [
        {
            "kind": kind,
            "tensor": f"blocks.{row}.0.conv_pw.weight",
            "detail": "0 and 1" if "swapped" in kind else None,
            "error": margin and margin * BOUND,
            "margin": margin,
            "detected": margin is None or margin > 1,
        }
        for row, (kind, margin) in enumerate(zip(kinds, margins, strict=True))
    ]
    drawn = {"kind": "eps times 100", "tensor": "bn2", "detail": "1e-05 to 1e-03", "reason": "no output moves"}
    found = {"seed": 0, "smallest_margin": min(filter(None, margins)), "undetected": undetected}
    return {**found, "mutants": rows, "undetectable": [drawn]}
