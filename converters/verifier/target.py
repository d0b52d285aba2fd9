"""The target's side of a verification: the emitted folder, loaded as a user would load it, and run.

Its outputs, by name:

    logits             model(x); a model without classes has none
    forward_features   model.forward_features(x)
    pre_logits         what the classifier is applied to
    features.K         the K-th of model.forward_intermediates(x), NCHW, before any final norm

A model made with `features_only` has the last kind alone: the K-th that it gives.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from converters.errors import ConverterError, TargetError, printable
from converters.verifier.recording import PRECISIONS, Activations

if TYPE_CHECKING:
    import torch

__all__ = ["blamed", "gives_features", "load_target", "run_model", "run_target", "single_threaded"]


def run_target(
    directory: Path,
    inputs: Mapping[str, np.ndarray],
    outputs: Sequence[str],
    weights: Mapping[str, Any] | None = None,
    precisions: Iterable[str] = PRECISIONS,
    models: dict[str, Any] | None = None,
) -> Activations:
    """Those of `outputs` that the model has, for every probe, in float64 and in float32.

    `weights` are put in the place of the folder's own. The model that ran in float64 is left in `models`. Raises
    TargetError when timm cannot load the folder or the model cannot take a probe.
    """
    found: Activations = {}
    with single_threaded():
        for precision in precisions:
            model = load_target(directory, precision, weights)
            if models is not None and precision == "float64":
                models[precision] = model
            found[precision] = {}
            for probe, array in inputs.items():
                with blamed(directory, f"its model cannot run {probe} {array.shape} in {precision}"):
                    found[precision][probe] = run_model(model, array.astype(precision), outputs)
    return found


def load_target(directory: Path, precision: str, weights: Mapping[str, Any] | None = None) -> Any:
    """The folder's model, in eval mode, with `weights` in the place of its own. Raises TargetError."""
    import timm
    import torch

    with blamed(directory, f"timm cannot load it in {precision}"):
        model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
        model = model.to(getattr(torch, precision))
        if weights:
            model.load_state_dict(weights, strict=False)
        return model


def run_model(model: Any, x: np.ndarray, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Those of the outputs `names` that the model has."""
    import torch

    with torch.no_grad():
        return {name: value.numpy() for name, value in _outputs(model, torch.from_numpy(x), names).items()}


def gives_features(model: Any) -> bool:
    """Whether it was made with `features_only`, and gives a list of feature maps."""
    return hasattr(getattr(model, "feature_info", None), "out_indices")


@contextmanager
def single_threaded() -> Iterator[None]:
    """Sums in one order, so that a run can be repeated to the bit."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _outputs(model: Any, x: torch.Tensor, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """The outputs; what `forward_features` gave while the logits were made is not made again."""
    if gives_features(model):
        return {name: value for k, value in enumerate(model(x)) if (name := f"features.{k}") in names}
    found: dict[str, torch.Tensor] = {}
    features: list[torch.Tensor] = []
    with _heard(model, x, features):
        if "logits" in names and model.num_classes:
            found["logits"] = model(x)
        if {"forward_features", "pre_logits"} & set(names) and not features:
            model.forward_features(x)
    if "forward_features" in names:
        found["forward_features"] = features[0]
    if "pre_logits" in names:
        found["pre_logits"] = model.forward_head(features[0].clone(), pre_logits=True)
    matches = [re.fullmatch(r"features\.([0-9]{1,3})", name) for name in names]
    if levels := sorted({int(match[1]) for match in matches if match}):
        maps = model.forward_intermediates(x, indices=levels, norm=False, output_fmt="NCHW", intermediates_only=True)
        found |= {f"features.{level}": value for level, value in zip(levels, maps, strict=True)}
    return found


@contextmanager
def _heard(model: Any, x: torch.Tensor, features: list[torch.Tensor]) -> Iterator[None]:
    """As long as this lasts, what the model's `forward_features` gives for `x` is noted."""
    ask = model.forward_features

    def note(*args: Any, **kwargs: Any) -> Any:
        given = ask(*args, **kwargs)
        if args and args[0] is x:
            features.append(given.clone())  # what follows may work in place
        return given

    model.forward_features = note
    try:
        yield
    finally:
        del model.forward_features


@contextmanager
def blamed(directory: Path, problem: str) -> Iterator[None]:
    """Any fault of timm's or torch's, as one line about the folder."""
    try:
        yield
    except ConverterError:
        raise
    except Exception as error:
        reason = printable(" ".join(f"{type(error).__name__}: {error}".split()), 400)
        raise TargetError(f"{problem}: {reason}", file=directory) from error
