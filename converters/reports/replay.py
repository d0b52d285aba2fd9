"""Replays a comparison: the converted model on recorded inputs, against the outputs that were recorded.

    python replay.py [OUTPUT ...]

Run it in the folder that `timmport verify --repro` wrote. It needs torch, timm and numpy, and neither timmport nor
the source framework. For each output of each probe it prints the error, the largest difference in a sample over the
largest magnitude that the sample should have, and what is allowed; exit code 1 where one is beyond that.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

__all__ = ["main", "replay"]

BOUND = 1e-10  # in float64
FACTOR, FLOOR = 4.0, 16 * 2.0**-24  # in float32: the reference's distance from a float64 run, over the target's own


def replay(folder: Path, wanted: list[str]) -> bool:
    """Print every output's error; whether all are within their bounds."""
    with np.load(folder / "recording.npz", allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    inputs = {name[6:]: array for name, array in arrays.items() if name.startswith("input.")}
    precision = "float64" if any(name.startswith("float64.") for name in arrays) else "float32"
    models = {name: load(folder, name) for name in dict.fromkeys(("float64", precision))}
    passed = True
    for name, right in arrays.items():
        kind, _, rest = name.partition(".")
        probe, _, output = rest.partition(".")
        if kind != precision or (wanted and output not in wanted):
            continue
        given = {kind: run(model, inputs[probe].astype(kind), output) for kind, model in models.items()}
        if any(array is None or array.shape != right.shape for array in given.values()):
            print(f"FAILED  {output} on {probe}: the target has no such output of shape {right.shape}")
            passed = False
            continue
        found, allowed = compare(given, right, precision)
        worst = int(np.argmax(np.nan_to_num(found / allowed, nan=np.inf)))
        good = bool((found <= allowed).all())
        print(
            f"{'passed' if good else 'FAILED'}  {output} on {probe} in {precision}: "
            f"error {found[worst]:.1e} where {allowed[worst]:.1e} is allowed (sample {worst})"
        )
        passed &= good
    return passed


def load(folder: Path, precision: str) -> Any:
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval().to(getattr(torch, precision))


def run(model: Any, array: np.ndarray, output: str) -> np.ndarray | None:
    """One output of the model by timmport's name; None where it has no such output."""
    x = torch.from_numpy(array)
    level = re.fullmatch(r"features\.([0-9]+)", output)
    with torch.no_grad():
        if output == "logits":
            found = model(x)
        elif output == "forward_features":
            found = model.forward_features(x)
        elif output == "pre_logits":
            found = model.forward_head(model.forward_features(x), pre_logits=True)
        elif level:
            options = {"indices": [int(level[1])], "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
            (found,) = model.forward_intermediates(x, **options)
        else:
            return None
    return found.numpy()


def compare(given: dict[str, np.ndarray], right: np.ndarray, precision: str) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's error, and what is allowed."""
    if precision == "float64":
        return errors(given["float64"], right), np.full(len(right), BOUND)
    own = errors(given["float32"], given["float64"])
    return errors(right, given["float64"]), FACTOR * np.maximum(own, FLOOR)


def errors(given: np.ndarray, right: np.ndarray) -> np.ndarray:
    right = right.astype(np.float64).reshape(len(right), -1)
    difference = np.abs(given.reshape(right.shape) - right).max(axis=1)
    scale = np.abs(right).max(axis=1)
    return np.where(difference == 0, 0.0, difference / np.where(scale > 0, scale, np.finfo(float).tiny))


def main() -> int:
    return 0 if replay(Path(__file__).resolve().parent, sys.argv[1:]) else 1


if __name__ == "__main__":
    sys.exit(main())
