"""Mutants: whether the comparison would notice a wrong conversion, asked by damaging the target on purpose.

Each mutant is the converted model with one fault (see faults.py); it is run on a probe and goes through the same
gates, which must refuse it. The places are drawn, spread over the depth. A draw that leaves the tensors as they
were, or after which no output of the model moves, is no mutant: with these weights nothing could detect it. It is
listed and drawn again elsewhere. A mutant that moves an output and passes leaves the conversion unproven.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.verifier.compare import compare
from converters.verifier.faults import KINDS, Fault, Kind, applied
from converters.verifier.recording import Recording
from converters.verifier.target import gives_features, load_target, run_model, single_threaded
from converters.verifier.verdict import Comparison

__all__ = ["Mutant", "Mutants", "Undetectable", "run_mutants"]

DRAWS = 6  # for one mutant, at most
UNMOVED = 1e-13  # relative; rounding alone moves float64 outputs by less


@dataclass(frozen=True)
class Mutant:
    """A damaged model, compared."""

    kind: str
    tensor: str
    detail: str
    error: float  # of the output that shows it most, scaled as in compare.py
    margin: float  # the error over its bound
    detected: bool


@dataclass(frozen=True)
class Undetectable:
    """A draw that damaged nothing."""

    kind: str
    tensor: str
    detail: str
    reason: str


@dataclass(frozen=True)
class Mutants:
    """What became of every mutant."""

    seed: int
    mutants: tuple[Mutant, ...]
    undetectable: tuple[Undetectable, ...] = ()

    @property
    def undetected(self) -> int:
        return sum(not mutant.detected for mutant in self.mutants)

    @property
    def smallest_margin(self) -> float:
        return min((mutant.margin for mutant in self.mutants), default=math.nan)

    @property
    def passed(self) -> bool:
        """Whether there were any, and all were detected."""
        return bool(self.mutants) and not self.undetected

    def __str__(self) -> str:
        if not self.mutants:
            return "unproven: with these weights no mutant can be detected"
        weakest = min(self.mutants, key=lambda mutant: mutant.margin)
        which = f"{weakest.kind}, {weakest.tensor} ({weakest.detail})"
        if self.undetected:
            return f"unproven: {self.undetected} of {len(self.mutants)} mutants pass: {which}"
        return f"{len(self.mutants)} mutants fail, all by at least {weakest.margin:.0e} times the bound: {which}"

    def document(self) -> dict[str, Any]:
        """Its part of verification.json."""
        return {**asdict(self), "smallest_margin": self.smallest_margin, "undetected": self.undetected}


def run_mutants(
    directory: Path,
    recording: Recording,
    *,
    seed: int = 0,
    weights: Mapping[str, Any] | None = None,
    deviation: Sequence[Mapping[str, Any]] = (),
    filled: Iterable[str] = (),
    models: Mapping[str, Any] | None = None,
) -> Mutants:
    """Damage the emitted folder's model in memory, in one way after another, and compare it with the recording.

    Only the target runs: on one probe, in the recording's best precision. `weights` stand in the place of the
    folder's own; `filled` are tensors that the source does not have, whose faults count where a compared output moves;
    `models` are those that are loaded already, by precision. Where the modules that the mapping's `deviation` names can
    be given what the source's have, and are exact then, mutants are judged so; else by the error that is declared.
    Raises TargetError.
    """
    with single_threaded():
        precision = "float64" if "float64" in recording.outputs else "float32"
        ready = {
            name: (models or {}).get(name) or load_target(directory, name, weights)
            for name in sorted({"float64", precision})
        }
        trial = _Trial(ready, recording, precision, sum(one["bound"] for one in deviation), frozenset(filled))
        if deviation:
            trial.mend(deviation)
        found = [one for number, kind in enumerate(KINDS) for one in _try(trial, kind, number, seed)]
    mutants = tuple(one for one in found if isinstance(one, Mutant))
    return Mutants(seed, mutants, tuple(one for one in found if isinstance(one, Undetectable)))


def _try(trial: _Trial, kind: Kind, number: int, seed: int) -> Iterator[Mutant | Undetectable]:
    """Mutants of one kind, after the draws that came to nothing."""
    rng = np.random.default_rng((seed, number))
    places = list(kind.places(trial.model))
    for draw in range(len(places) if kind.times is None else kind.times):
        for place in _drawn(places, number + draw, rng):
            places.remove(place)
            fault = kind.damage(trial.model, place, rng)
            result = trial.run(fault)
            if isinstance(result, str):
                yield Undetectable(kind.name, fault.tensor, fault.detail, result)
            else:
                yield Mutant(kind.name, fault.tensor, fault.detail, *result)
                break


def _drawn(places: list[str], draw: int, rng: np.random.Generator) -> list[str]:
    """Places in the order in which they are tried, first one from a third of the depth: each draw has the next."""
    third = [place for i, place in enumerate(places) if i * 3 // len(places) == draw % 3]
    return list(dict.fromkeys(map(str, [*rng.permutation(third)[:1], *rng.permutation(places)])))[:DRAWS]


class _Trial:
    """The models that are damaged, and what they are compared with."""

    def __init__(
        self, models: dict[str, Any], recording: Recording, precision: str, allowed: float, filled: frozenset[str]
    ) -> None:
        self.models, self.model, self.allowed, self.filled = models, models["float64"], allowed, filled
        self.probe = "normal" if "normal" in recording.inputs else next(iter(recording.inputs))
        self.x, self.names = recording.inputs[self.probe], sorted(recording.output_names, key=_order)
        self.reference = {precision: recording.outputs[precision][self.probe]}

    def mend(self, deviation: Sequence[Mapping[str, Any]]) -> None:
        """Take the source's part in what is declared, if that leaves nothing else."""
        before, allowed = [], self.allowed
        for one in deviation:
            modules = [model.get_submodule(name) for model in self.models.values() for name in one["where"]]
            for module in modules:
                if getattr(module, one["attribute"], None) == one["target"]:
                    before.append((module, one["attribute"], one["target"]))
                    setattr(module, one["attribute"], one["source"])
        self.allowed = 0.0
        if not all(comparison.passed for comparison in self._compare(self.names)):
            self.allowed = allowed
            for module, attribute, value in before:
                setattr(module, attribute, value)

    def run(self, fault: Fault) -> tuple[float, float, bool] | str:
        """The mutant's error and margin, and whether it is detected; or why nothing could detect it.

        Most are noticed by one sample of the output that the most depends on, and need not be run on the rest.
        """
        if not fault.changes(self.model):
            return "the tensors stay as they are, bit for bit"
        with applied(fault, self.models.values()):
            comparisons = self._compare(self.names[:1], 1)
            if all(comparison.passed for comparison in comparisons):
                comparisons = self._compare(self.names)
            detected = not all(comparison.passed for comparison in comparisons)
            shown = [] if detected else self._shown(fault)
            damaged = self._run(shown)
        if not detected and not _differ(damaged, self._run(shown)):
            return "no output moves: the input or a gain behind it is zero, or the function does not depend on it"
        worst = max(comparisons, key=lambda comparison: comparison.share)
        return max(worst.sample_errors, default=math.inf), worst.share, detected

    def _compare(self, names: Sequence[str], samples: int | None = None) -> tuple[Comparison, ...]:
        answers = {
            precision: run_model(model, self.x[:samples].astype(precision), names)
            for precision, model in self.models.items()
        }
        target = {precision: {self.probe: outputs} for precision, outputs in answers.items()}
        reference = {precision: {self.probe: _first(outputs, samples)} for precision, outputs in self.reference.items()}
        return compare(reference, target, names, allowed=self.allowed)

    def _shown(self, fault: Fault) -> list[str]:
        """The outputs that may show a fault: those compared and, of what is the source's, the model's last."""
        own = fault.tensors(self.model)
        if gives_features(self.model) or (own and own <= self.filled):
            return self.names
        return [*self.names, "logits" if self.model.num_classes else "pre_logits"]

    def _run(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        return run_model(self.model, self.x.astype("float64"), names) if names else {}


def _order(output: str) -> tuple[int, int]:
    """Sorts outputs, those on which the most depends first.

    >>> sorted(["features.2", "features.11", "forward_features", "logits"], key=_order)
    ['logits', 'forward_features', 'features.11', 'features.2']
    """
    kind, _, level = output.partition(".")
    return ("logits", "pre_logits", "forward_features", "features").index(kind), -int(level or 0)


def _first(outputs: Mapping[str, np.ndarray], samples: int | None) -> dict[str, np.ndarray]:
    return {name: array[:samples] for name, array in outputs.items()}


def _differ(some: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> bool:
    pairs = [(array, others[name]) for name, array in some.items()]
    return any(np.abs(one - other).max() > UNMOVED * np.abs(other).max() for one, other in pairs)
