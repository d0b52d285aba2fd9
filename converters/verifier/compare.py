"""The comparison: gates that decide whether two models gave the same outputs, and figures that only inform.

A gate looks at one output of one probe, sample by sample. An error is the largest difference in a sample over
the largest magnitude that the sample should have.

    float64   the reference ran in float64: the target's error is at most 1e-10.
    float32   it could not: the target's own float64 run is the oracle, and the reference is at most 4 times as
              far from it as the target's float32 run, or as 16 units of float32 rounding.

A missing output, another shape, NaN and Inf fail. Means, cosines and agreements never decide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from converters.verifier.recording import Activations

__all__ = ["FLOAT32_FACTOR", "FLOAT32_FLOOR", "FLOAT64_BOUND", "Comparison", "Verdict", "compare"]

FLOAT64_BOUND = 1e-10
FLOAT32_FACTOR = 4.0
FLOAT32_FLOOR = 16 * 2.0**-24
WEAK = 1e-3  # a float32 bound above this proves little
STILL = 1e-3  # samples whose difference is a smaller part of their magnitude are called alike


@dataclass(frozen=True)
class Comparison:
    """One output of one probe. Errors and bounds are one for each sample; where nothing could be measured, none."""

    output: str
    probe: str
    precision: str  # the gate that it went through
    reason: str | None = None  # why it did not pass
    sample_errors: tuple[float, ...] = ()
    bounds: tuple[float, ...] = ()
    information: dict[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return self.reason is None

    @property
    def share(self) -> float:
        """The worst sample's error as a share of its bound."""
        return max((e / b for e, b in zip(self.sample_errors, self.bounds, strict=True)), default=math.inf)


@dataclass(frozen=True)
class Verdict:
    """What a verification found."""

    comparisons: tuple[Comparison, ...]
    reference: dict[str, Any]  # what the recording says about itself
    target: dict[str, Any]  # the converted weights, and the versions that ran them

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and all(comparison.passed for comparison in self.comparisons)

    @property
    def precision(self) -> str:
        """The weakest gate that any output went through."""
        return "float32" if any(c.precision == "float32" for c in self.comparisons) else "float64"

    @property
    def warnings(self) -> tuple[str, ...]:
        found = [f"{c.output} on {c.probe}: {warning}" for c in self.comparisons for warning in c.warnings]
        return (*map(str, self.reference.get("notes", ())), *found)

    def __str__(self) -> str:
        failed = [c for c in self.comparisons if not c.passed]
        if failed:
            return f"not the same function: {failed[0].output} on {failed[0].probe}: {failed[0].reason}"
        if not self.comparisons:
            return "not verified: nothing was compared"
        worst = max(self.comparisons, key=lambda c: c.share)
        outputs = len({c.output for c in self.comparisons})
        return (
            f"the same function in {self.precision}: {outputs} output{'s' * (outputs > 1)}, worst error "
            f"{max(worst.sample_errors):.1e} of {min(worst.bounds):.1e} allowed ({worst.output} on {worst.probe})"
        )

    def to_json(self) -> str:
        """JSON text; a figure that is not finite is null."""
        document = {
            "verification": 1,
            "passed": self.passed,
            "precision": self.precision,
            "warnings": self.warnings,
            "reference": self.reference,
            "target": self.target,
            "comparisons": [{"passed": c.passed, **asdict(c)} for c in self.comparisons],
        }
        return json.dumps(_finite(document), indent=1, allow_nan=False)


def compare(
    reference: Activations, target: Activations, outputs: Iterable[str], labels: Mapping[str, np.ndarray] | None = None
) -> tuple[Comparison, ...]:
    """Every one of `outputs` on every probe that the reference answered.

    `labels` are the true classes of a probe's samples; they only inform.
    """
    probes = dict.fromkeys(probe for answers in reference.values() for probe in answers)
    return tuple(
        _compare(output, probe, reference, target, (labels or {}).get(probe)) for output in outputs for probe in probes
    )


def _compare(
    output: str, probe: str, reference: Activations, target: Activations, labels: np.ndarray | None
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
        errors, bounds = _errors(mine, theirs), np.full(len(mine), FLOAT64_BOUND)
        if "float32" in ref:
            information["float32_error"] = float(_errors(tgt["float32"], ref["float32"]).max())
    else:
        oracle = tgt["float64"]
        errors = _errors(theirs, oracle)
        bounds = FLOAT32_FACTOR * np.maximum(_errors(mine, oracle), FLOAT32_FLOOR)
        if bounds.max() > WEAK:
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
    if not {"float64", "float32"} <= tgt.keys():
        return "the target has no such output"
    if ref[precision].shape != tgt[precision].shape:
        return f"its shape is {ref[precision].shape} in the reference and {tgt[precision].shape} in the target"
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


def _finite(value: Any) -> Any:
    """Plain JSON values, with null for what JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
