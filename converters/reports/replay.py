"""Replays a comparison: the converted model on recorded inputs, against the outputs that were recorded.

    python replay.py [OUTPUT ...]

It stands in a folder that `timmport verify --repro` wrote and needs torch, timm and numpy, neither timmport nor the
source framework. The model runs in float64. For each output of each probe it prints the error, the largest
difference in a sample over the largest magnitude that the sample should have, and what the verification allowed;
exit code 1 where one is beyond that.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

__all__ = ["incomparable", "main", "relative", "run"]


def main(folder: Path, wanted: list[str]) -> int:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().double()
    found = json.loads((folder / "verification.json").read_text("utf-8"))
    passed = True
    with np.load(folder / "recording.npz", allow_pickle=False) as arrays:
        for one in found["comparisons"]:
            output, probe, precision = one["output"], one["probe"], one["precision"]
            if wanted and output not in wanted:
                continue
            right = arrays.get(f"{precision}.{probe}.{output}")
            given = run(model, arrays[f"input.{probe}"].astype("float64"), output)
            reason = incomparable(right, given)
            if reason is None:
                pair = (given, right) if precision == "float64" else (right, given)  # the second is right
                errors, bounds = relative(*pair), np.array(one["bounds"] or [0.0], dtype=float)
                worst = int(np.argmax(errors - bounds))
                bound = bounds[min(worst, len(bounds) - 1)]
                reason = f"error {errors[worst]:.1e} where {bound:.1e} is allowed (sample {worst})"
                good = bool((errors <= bounds).all())
            else:
                good = False
            passed &= good
            print(f"{'passed' if good else 'FAILED'}  {output} on {probe} in {precision}: {reason}")
    return 0 if passed else 1


def run(model: Any, x: np.ndarray, output: str) -> np.ndarray | None:
    """One output of the model, by timmport's name; None where it has no such output."""
    level = re.fullmatch("features[.]([0-9]+)", output)
    with torch.no_grad():
        image = torch.from_numpy(x)
        if output == "logits" and model.num_classes:
            found = model(image)
        elif output == "forward_features":
            found = model.forward_features(image)
        elif output == "pre_logits":
            found = model.forward_head(model.forward_features(image), pre_logits=True)
        elif level:
            options = {"indices": [int(level[1])], "norm": False, "output_fmt": "NCHW", "intermediates_only": True}
            (found,) = model.forward_intermediates(image, **options)
        else:
            return None
    return found.numpy()


def incomparable(right: np.ndarray | None, given: np.ndarray | None) -> str | None:
    """Why there is nothing to measure."""
    if right is None or given is None:
        return f"the {'reference' if right is None else 'target'} has no such output"
    if right.shape != given.shape:
        return f"its shape is {right.shape} in the reference and {given.shape} in the target"
    return None if np.isfinite(right).all() and np.isfinite(given).all() else "one side gives NaN or Inf"


def relative(given: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Each sample's largest difference over its largest magnitude."""
    right = right.astype(np.float64).reshape(len(right), -1)
    difference = np.abs(given.reshape(right.shape) - right).max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference > 0, difference / np.abs(right).max(axis=1), 0.0)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent, sys.argv[1:]))
