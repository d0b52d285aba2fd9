"""Where two models begin to differ, and which module is to blame.

    free      timm's model runs on the probe, and the output of every paired module is compared.
    forced    it runs once more, and what enters and leaves a paired module is compared, and then replaced by what
              the reference has there. So each difference is made by one module, or between two, from nothing but
              the reference's own values: drift is gone, and a defect shows where it is.

Both are float64. A free error may be 1e-10. A forced one may be 64 units of rounding times the root of how many
terms its sums have, or 8 times what a disturbance of all inputs in the last digits makes of it. What is wrong
between two modules is laid to the paired module around the second, or where there is none, to the second.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from converters.ops import OpError
from converters.verifier.compare import FLOAT64_BOUND
from converters.verifier.layouts import as_source, as_timm, channel_axis, reordered
from converters.verifier.recording import Recording, Taps
from converters.verifier.references.torch_modules import first_tensor
from converters.verifier.taps import Pair
from converters.verifier.verdict import Tap, Unchecked

__all__ = ["compare_taps"]

UNIT = 2.0**-53
FACTOR = 64.0
SPREAD = 8.0
DISTURBANCE = 4 * UNIT
LARGEST = 1e-6  # no error above this is taken for rounding
MOST_CHANNELS = 512

Place = tuple[str, str]  # a module of timm's, and its "input" or "output"


@dataclass(frozen=True)
class _Measure:
    """An error, as a share of the reference's largest magnitude."""

    error: float
    terms: int  # in a sum
    channels: tuple[float, ...]


Measures = dict[Place, _Measure | str]  # or why there is nothing to measure


def compare_taps(
    model: Any, recording: Recording, pairs: Sequence[Pair], deviation: Sequence[Mapping[str, Any]] = ()
) -> tuple[tuple[Tap, ...], tuple[Unchecked, ...]]:
    """Every pair on the recording's taps; without them none is checked.

    `model` is timm's, in float64; `deviation` as in conversion.json.
    """
    taps = recording.taps
    if taps is None:
        reason = "the reference recorded no taps"
        return (), tuple(Unchecked(pair.source, pair.target, pair.line, reason) for pair in pairs)
    trial = _Trial(model, recording.inputs[taps.probe], taps, pairs)
    free, forced = trial.run(), trial.run(force=True)
    bounds = _bounds(trial, forced, deviation)
    bound = max(FLOAT64_BOUND, sum(one["bound"] for one in deviation))
    place = {name: index for index, name in enumerate(taps.outputs)}
    reached = _reached([pair.target for pair in pairs])
    found, unchecked = list[Tap](), []
    for pair in sorted(pairs, key=lambda pair: place.get(pair.output, len(place))):
        measure = free[pair.target, "output"]
        if isinstance(measure, str):
            unchecked.append(Unchecked(pair.source, pair.target, pair.line, measure))
            continue
        passed = measure.error <= bound
        local = _local(pair.target, reached.get(pair.target, []), forced, bounds)
        where = (pair.source, pair.target, pair.line, taps.probe, len(found))
        channels = () if passed else measure.channels
        found.append(Tap(*where, measure.error, bound, passed, *local, channels=channels))
    return tuple(found), tuple(unchecked)


def _local(
    target: str, reached: Sequence[str], forced: Measures, bounds: Mapping[Place, float]
) -> tuple[float | None, float | None, bool | None, str | None]:
    """The worst of a module's own output and of what reaches the modules in it: error, bound, passed, reason."""
    places = [(one, "input") for one in reached]
    if not isinstance(forced[target, "input"], str):
        places.append((target, "output"))
    measured = [(place, measure) for place in places if isinstance(measure := forced[place], _Measure)]
    if not measured:
        reasons = (forced[target, kind] for kind in ("input", "output"))
        reason = next(reason for reason in reasons if isinstance(reason, str))
        return None, None, None, f"not on the reference's own input: {reason}"
    failed = [(place, measure) for place, measure in measured if not measure.error <= bounds[place]]
    place, measure = max(failed or measured, key=lambda one: one[1].error / bounds[one[0]])
    before = f"what reaches {place[0]} is already wrong" if failed and place[1] == "input" else None
    return measure.error, bounds[place], not failed, before


def _reached(targets: Sequence[str]) -> dict[str, list[str]]:
    """The modules for whose inputs each answers: those next below it, and itself where nothing is around it."""
    known = set(targets)
    found: dict[str, list[str]] = {}
    for target in targets:
        outer = target.rpartition(".")[0]
        while outer and outer not in known:
            outer = outer.rpartition(".")[0]
        found.setdefault(outer or target, []).append(target)
    return found


def _bounds(trial: _Trial, forced: Measures, deviation: Sequence[Mapping[str, Any]]) -> dict[Place, float]:
    """What each forced error may be."""
    bounds, near = dict[Place, float](), set[Place]()
    for place, measure in forced.items():
        if isinstance(measure, _Measure):
            inside = [one for one in deviation if any(f"{w}.".startswith(f"{place[0]}.") for w in one["where"])]
            bounds[place] = max([FACTOR * UNIT * measure.terms**0.5, *(one["bound"] for one in inside)])
            if bounds[place] < measure.error < LARGEST:
                near.add(place)
    if near:
        still, moved = dict[Place, Any](), dict[Place, Any]()
        trial.run(force=True, near=near, keep=still)
        trial.run(force=True, near=near, keep=moved, disturb=True)
        for place in near:
            spread = float((moved[place] - still[place]).abs().max() / still[place].abs().max())
            bounds[place] = max(bounds[place], SPREAD * spread)
    return bounds


@dataclass(frozen=True)
class _Trial:
    """timm's model, its input, and what its modules are compared with."""

    model: Any
    x: Any
    taps: Taps
    pairs: Sequence[Pair]

    def run(
        self, *, force: bool = False, disturb: bool = False, near: set[Place] | None = None, keep: Any = None
    ) -> Measures:
        """One forward pass, watched; what lies at the places `near` is kept."""
        modules = dict(self.model.named_modules())
        watches = [
            _Watch(pair, modules[pair.target], self.taps, force, disturb, near or set(), keep)
            for pair in self.pairs
            if pair.target in modules
        ]
        with torch.no_grad(), _hooked(watches):
            self.model(torch.from_numpy(self.x.astype("float64")))
        found: Measures = {
            (pair.target, kind): f"timm runs no {pair.target}" for pair in self.pairs for kind in ("input", "output")
        }
        for watch in watches:
            found.update(watch.found)
        return found


@contextmanager
def _hooked(watches: Sequence[_Watch]) -> Iterator[None]:
    handles = [handle for watch in watches for handle in watch.hook()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Watch:
    """A paired module of timm's while it runs; its first call counts."""

    pair: Pair
    module: Any
    taps: Taps
    force: bool
    disturb: bool
    near: set[Place]
    keep: Any
    found: Measures = field(default_factory=dict)
    calls: int = 0

    def hook(self) -> list[Any]:
        return [self.module.register_forward_pre_hook(self.enter), self.module.register_forward_hook(self.leave)]

    def enter(self, _module: Any, args: tuple[Any, ...]) -> Any:
        self.calls += 1
        if self.calls > 1 or not self.force:
            return None
        given = self._replaced("input", self.pair.source, args[0] if args else None)
        return None if given is None else (given, *args[1:])

    def leave(self, _module: Any, _args: Any, output: Any) -> Any:
        if self.calls > 1:
            return None
        given = self._replaced("output", self.pair.output, first_tensor(output))
        return given if isinstance(output, torch.Tensor) else None

    def _replaced(self, kind: str, name: str, tensor: Any) -> torch.Tensor | None:
        """Compare a tensor with what the reference has there; that, if it is to take its place."""
        right, place = self._right(kind, name), (self.pair.target, kind)
        self.found[place] = found = _compare(self.pair, self.module, kind, tensor, right)
        if place in self.near:
            self.keep[place] = tensor.clone()
        if isinstance(found, str) or not self.force:
            return None
        given = as_timm(self.pair, right, tensor)
        return _disturbed(given) if self.disturb else given

    def _right(self, kind: str, name: str) -> Any:
        """What the reference has there, its channels in timm's order; or why it has nothing."""
        number = (self.taps.inputs if kind == "input" else self.taps.outputs).get(name)
        if number is not None:
            return reordered(torch.from_numpy(self.taps.read(number).copy()), self.pair, self.module, kind)
        if name in self.taps.left_out:
            return "the recording had no room for it"
        return f"the reference runs no {name}, or its {kind} is no tensor"


def _compare(pair: Pair, module: Any, kind: str, tensor: Any, right: Any) -> _Measure | str:
    if isinstance(right, str):
        return right
    if not isinstance(tensor, torch.Tensor):
        return f"its first {kind} in timm is no tensor"
    try:
        mine = as_source(pair, tensor)
    except OpError as error:
        return str(error)
    if mine.shape != right.shape:
        return f"its {kind} is {tuple(right.shape)} in the reference and {tuple(mine.shape)} in timm"
    if not tensor.numel():
        return f"its {kind} is empty"
    axis, scale = channel_axis(pair, tensor), float(right.abs().max())
    worst = as_timm(pair, (mine - right).abs(), tensor).movedim(axis, 0).flatten(1).amax(1)
    terms = module.weight[0].numel() if kind == "output" and _is_linear(module) else tensor[0].numel()
    channels = tuple(_share(float(error), scale) for error in worst[:MOST_CHANNELS])
    return _Measure(_share(float(worst.max()), scale), terms, channels)


def _disturbed(tensor: torch.Tensor) -> torch.Tensor:
    signs = 2 * torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(0)) - 1
    return tensor * (1 + DISTURBANCE * signs.to(tensor.dtype))


def _is_linear(module: Any) -> bool:
    return isinstance(module, (torch.nn.Linear, torch.nn.modules.conv._ConvNd))


def _share(error: float, scale: float) -> float:
    return error / scale if scale else (float("inf") if error else 0.0)
