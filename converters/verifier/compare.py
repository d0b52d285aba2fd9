"""The comparison: gates that decide whether two models gave the same outputs, and figures that only inform.

A gate looks at one output of one probe, sample by sample. An error is the largest difference in a sample over
the largest magnitude that the sample should have.

    float64   the reference ran in float64: the target's error is at most 1e-10.
    float32   it could not: the target's own float64 run is the oracle, and the reference is at most 4 times as
              far from it as the target's float32 run, or as 16 units of float32 rounding.

Where the mapping declares a deviation, its bound is allowed too. A missing output, another shape or dtype, NaN and
Inf fail. Means, cosines and agreements never decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from converters.verifier.recording import Activations
from converters.verifier.verdict import Comparison

__all__ = ["FLOAT32_FACTOR", "FLOAT32_FLOOR", "FLOAT64_BOUND", "compare"]

FLOAT64_BOUND = 1e-10
FLOAT32_FACTOR = 4.0
FLOAT32_FLOOR = 16 * 2.0**-24
WEAK = 1e-3  # a float32 bound above this proves little
STILL = 1e-3  # samples whose difference is a smaller part of their magnitude are called alike


def compare(
    reference: Activations,
    target: Activations,
    outputs: Iterable[str],
    labels: Mapping[str, np.ndarray] | None = None,
    *,
    allowed: float = 0.0,
) -> tuple[Comparison, ...]:
    """Every one of `outputs` on every probe that the reference answered.

    `labels` are the true classes of a probe's samples; they only inform. `allowed` is an error that passes in any
    case, as the mapping declares it.
    """
    probes = dict.fromkeys(probe for answers in reference.values() for probe in answers)
    return tuple(
        _compare(output, probe, reference, target, (labels or {}).get(probe), allowed)
        for output in outputs
        for probe in probes
    )


def _compare(
    output: str, probe: str, reference: Activations, target: Activations, labels: np.ndarray | None, allowed: float
) -> Comparison:
    ref, tgt = (
        {precision: probes[probe][output] for precision, probes in side.items() if output in probes.get(probe, {})}
        for side in (reference, target)
    )
    precision = "float64" if "float64" in ref else "float32"
    if reason := _incomparable(ref, tgt, precision):
        return Comparison(output, probe, precision, reason)
    mine, theirs = tgt[precision], ref[precision]
    information = _figures(theirs, mine)
    if output == "logits":
        information |= _agreement(theirs, mine, labels)
    warnings = []
    if len(theirs) > 1 and np.ptp(theirs, axis=0).max() <= STILL * np.abs(theirs).max():
        warnings.append("hardly depends on the input")
    if precision == "float64":
        errors, bounds = _errors(mine, theirs), np.full(len(mine), max(FLOAT64_BOUND, allowed))
        if "float32" in ref:
            information["float32_error"] = float(_errors(tgt["float32"], ref["float32"]).max())
    else:
        oracle = tgt["float64"]
        errors = _errors(theirs, oracle)
        bounds = np.maximum(FLOAT32_FACTOR * np.maximum(_errors(mine, oracle), FLOAT32_FLOOR), allowed)
        if bounds.max() > max(WEAK, allowed):
            warnings.append(
                f"float32 rounding alone moves it by {bounds.max() / FLOAT32_FACTOR:.0e}; this proves little"
            )
    worst = int(np.argmax(errors / bounds))
    passed = bool((errors <= bounds).all())
    return Comparison(
        output,
        probe,
        precision,
        None if passed else f"error {errors[worst]:.1e} where {bounds[worst]:.1e} is allowed (sample {worst})",
        tuple(map(float, errors)),
        tuple(map(float, bounds)),
        information,
        tuple(warnings),
    )


def _incomparable(ref: Mapping[str, np.ndarray], tgt: Mapping[str, np.ndarray], precision: str) -> str | None:
    """Why there is nothing to measure."""
    if precision not in ref:
        return "the reference has no such output"
    if not {"float64", *ref} <= tgt.keys():
        return "the target has no such output"
    if ref[precision].shape != tgt[precision].shape:
        return f"its shape is {ref[precision].shape} in the reference and {tgt[precision].shape} in the target"
    for name, array in tgt.items():
        if array.dtype != name:
            return f"the target gives {array.dtype} in {name}"
    if not ref[precision].ndim or not ref[precision].size:
        return "it is empty"
    for side, arrays in (("reference", ref), ("target", tgt)):
        for name, array in arrays.items():
            if not np.isfinite(array).all():
                return f"the {side} gives NaN or Inf in {name}"
    return None


def _errors(given: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The largest difference in each sample over the largest magnitude of the right one."""
    right = right.astype(np.float64).reshape(len(right), -1)
    difference = np.abs(given.reshape(right.shape) - right).max(axis=1)
    scale = np.abs(right).max(axis=1)
    with np.errstate(divide="ignore"):
        return np.where(difference > 0, difference / np.where(difference > 0, scale, 1), 0.0)


def _figures(ref: np.ndarray, tgt: np.ndarray) -> dict[str, float]:
    a, b = ref.astype(np.float64).ravel(), tgt.astype(np.float64).ravel()
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return {
        "max_abs": float(np.abs(a - b).max()),
        "mean_abs": float(np.abs(a - b).mean()),
        "cosine": float(a @ b / norms) if norms else math.nan,
    }


def _agreement(ref: np.ndarray, tgt: np.ndarray, labels: np.ndarray | None) -> dict[str, float]:
    """How often the classes agree: the first, the reference's first among the target's five, the true one."""
    first, five = ref.argmax(axis=-1), np.argsort(tgt, axis=-1)[..., -5:]
    found = {
        "top1": float((tgt.argmax(axis=-1) == first).mean()),
        "top5": float((five == first[..., None]).any(axis=-1).mean()),
    }
    if labels is not None and first.shape == labels.shape:
        found["accuracy"] = float((tgt.argmax(axis=-1) == labels).mean())
        found["reference_accuracy"] = float((first == labels).mean())
    return found
