"""The verdict: everything that a verification found, in a line and in JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["Comparison", "Finding", "Rounding", "Tap", "Unchecked", "Verdict"]


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
class Tap:
    """A pair of modules: how far their outputs differ, and how far they do on the reference's own inputs."""

    source: str
    target: str
    line: int  # of the mapping's row
    probe: str
    depth: int  # how many ended before it in the reference
    error: float
    bound: float
    passed: bool
    local_error: float | None = None  # None: not checked, and `reason` says why
    local_bound: float | None = None
    local_passed: bool | None = None
    reason: str | None = None
    channels: tuple[float, ...] = ()  # the error of each, where it did not pass


@dataclass(frozen=True)
class Unchecked:
    """A pair of modules that could not be compared."""

    source: str
    target: str
    line: int
    reason: str


@dataclass(frozen=True)
class Finding:
    """What paired modules declare differently. It names causes and decides nothing."""

    attribute: str
    kind: str  # timm's class
    source_value: Any
    target_value: Any
    modules: tuple[str, ...]  # timm's
    declared: str | None = None  # the reason, where the mapping declares it as a deviation

    def __str__(self) -> str:
        count = f"{len(self.modules)} module{'s' * (len(self.modules) > 1)}"
        found = f"{self.kind} {self.attribute} {self.target_value}, source {self.source_value}, {count}"
        return f"{found} (declared: {self.declared})" if self.declared else found


@dataclass(frozen=True)
class Rounding:
    """Whether weights in a narrower dtype than the source's are its own, rounded once, to the nearest."""

    dtype: str
    tensors: int  # how many were compared, bit for bit
    wrong: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.wrong


@dataclass(frozen=True)
class Verdict:
    """What a verification found. The outputs and the rounding decide; the rest tells where and why."""

    comparisons: tuple[Comparison, ...]
    reference: dict[str, Any]  # what the recording says about itself
    target: dict[str, Any]  # the converted weights, and the versions that ran them
    taps: tuple[Tap, ...] = ()  # in the order in which the reference's modules ended
    unchecked: tuple[Unchecked, ...] = ()
    audit: tuple[Finding, ...] = ()
    rounding: Rounding | None = None
    deviation: tuple[dict[str, Any], ...] = ()  # as the mapping declares it
    mutants: Any = None  # a Mutants, where they were run

    @property
    def passed(self) -> bool:
        rounded = self.rounding is None or self.rounding.passed
        return rounded and bool(self.comparisons) and all(comparison.passed for comparison in self.comparisons)

    @property
    def outcome(self) -> str:
        """passed, failed, or unproven: it passed, and so would have something wrong."""
        if not self.passed:
            return "failed"
        return "unproven" if self.mutants is not None and not self.mutants.passed else "passed"

    @property
    def precision(self) -> str:
        """The weakest gate that any output went through."""
        return "float32" if any(c.precision == "float32" for c in self.comparisons) else "float64"

    @property
    def first_divergence(self) -> Tap | None:
        """The first module whose output differs."""
        return next((tap for tap in self.taps if not tap.passed), None)

    @property
    def culprit(self) -> str | None:
        """timm's first module that computes something else from the same input."""
        return next((tap.target for tap in self.taps if tap.local_passed is False), None)

    @property
    def warnings(self) -> tuple[str, ...]:
        found = [f"{c.output} on {c.probe}: {warning}" for c in self.comparisons for warning in c.warnings]
        deviations = [f"deviation, within {one['bound']:g}: {one['reason']}" for one in self.deviation]
        return (*map(str, self.reference.get("notes", ())), *found, *deviations, *self._doubts())

    def _doubts(self) -> list[str]:
        """What a verdict that passed leaves open."""
        if not self.passed:
            return []
        if tap := self.first_divergence:
            return [f"the outputs agree, but {tap.target} and {tap.source} (line {tap.line}) are not alike"]
        if self.culprit:
            return [f"the outputs agree, but {self.culprit} does not on the reference's own input"]
        return []

    def __str__(self) -> str:
        failed = [c for c in self.comparisons if not c.passed]
        if failed:
            return f"not the same function: {failed[0].output} on {failed[0].probe}: {failed[0].reason}{self._where()}"
        if self.rounding and not self.rounding.passed:
            wrong = self.rounding.wrong
            more = f" and {len(wrong) - 1} more tensors are" if len(wrong) > 1 else " is"
            return f"not the same weights: {wrong[0]}{more} not the source's, rounded to {self.rounding.dtype}"
        if not self.comparisons:
            return "not verified: nothing was compared"
        worst = max(self.comparisons, key=lambda c: c.share)
        outputs = len({c.output for c in self.comparisons})
        taps = f" and {len(self.taps)} modules" if self.taps and not self.first_divergence else ""
        return (
            f"the same function in {self.precision}: {outputs} output{'s' * (outputs > 1)}{taps}, worst error "
            f"{max(worst.sample_errors):.1e} of {min(worst.bounds):.1e} allowed ({worst.output} on {worst.probe})"
        )

    def _where(self) -> str:
        if self.culprit:
            return f"; the fault is in {self.culprit}"
        if self.first_divergence is None:
            return ""
        where = f"; first at {self.first_divergence.target}"
        if any(tap.local_passed is None for tap in self.taps) or self.unchecked:
            return where
        return f"{where}, where no module is at fault by itself: rounding grows on the way"

    def to_json(self) -> str:
        """JSON text; a figure that is not finite is null."""
        divergence = self.first_divergence
        document = {
            "verification": 1,
            "passed": self.passed,
            "outcome": self.outcome,
            "summary": str(self),
            "precision": self.precision,
            "warnings": self.warnings,
            "reference": self.reference,
            "target": self.target,
            "comparisons": [{"passed": c.passed, **asdict(c)} for c in self.comparisons],
            "taps": [{key: value for key, value in asdict(tap).items() if key != "channels"} for tap in self.taps],
            "unchecked": [asdict(one) for one in self.unchecked],
            "first_divergence": asdict(divergence) if divergence else None,
            "culprit": self.culprit,
            "audit": [asdict(finding) for finding in self.audit],
            "rounding": {"passed": self.rounding.passed, **asdict(self.rounding)} if self.rounding else None,
            "deviation": self.deviation,
            "mutants": self.mutants.document() if self.mutants is not None else None,
        }
        return json.dumps(_finite(document), indent=1, allow_nan=False)


def _finite(value: Any) -> Any:
    """Plain JSON values, with null for what JSON cannot say."""
    if isinstance(value, Mapping):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
