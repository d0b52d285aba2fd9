"""The gate for rounded weights: each is the source's through the plan's ops, rounded once.

Those are weights in a narrower dtype than the source's, and those that an op calculates. The forward pass of rounded
weights cannot agree with the reference's, so it decides nothing. The source's own values are made once more, as
conversion.json says, compared with the stored ones bit for bit, and run in their
place: then the function is compared as sharply as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from converters.calculations import constant
from converters.errors import CheckpointError, printable
from converters.ops import OpError, Pipeline
from converters.readers import Checkpoint
from converters.tensors import to_torch
from converters.verifier.subject import Subject
from converters.verifier.verdict import Comparison, Rounding

__all__ = ["nearest", "unrounded", "with_errors"]

Answers = Mapping[str, Mapping[str, np.ndarray]]  # probe -> output -> array

FORMATS = {  # binary digits, least exponent, largest value
    "float16": (11, -14, 65504.0),
    "bfloat16": (8, -126, 255 * 2.0**120),
    "float32": (24, -126, (2 - 2.0**-23) * 2.0**127),
}


def unrounded(subject: Subject, checkpoint: Checkpoint) -> tuple[dict[str, Any], Rounding | None]:
    """The tensors that were rounded, as the source has them, and whether they were rounded well.

    None where every tensor is the source's, bit for bit. Raises CheckpointError.
    """
    from safetensors import safe_open

    exact: dict[str, Any] = {}
    wrong, dtypes = [], list[str]()
    path = subject.directory / "model.safetensors"
    with safe_open(path, "pt") as stored:
        names = set(stored.keys())
        for name, origin in subject.tensors.items():
            if not _is_computed(name, origin, subject):
                continue
            given = stored.get_tensor(name) if name in names else None
            right = _recomputed(name, subject, checkpoint, given)
            if not right.is_floating_point() or (given is not None and given.dtype == right.dtype):
                continue
            kept = checkpoint.tensors[origin["from"][0]].spec.dtype if "from" in origin else "float32"
            dtypes.append(kept if subject.dtype == "source" else subject.dtype)
            exact[name] = right
            if given is None or not _is_rounded(given, right, dtypes[-1]):
                wrong.append(name)
    return exact, Rounding(dtypes[0], len(dtypes), tuple(wrong)) if dtypes else None


def _is_computed(name: str, origin: Mapping[str, Any], subject: Subject) -> bool:
    """Whether it may have been rounded: by an op that calculates, by a formula, or since that was asked for."""
    if "from" not in origin:
        return isinstance(origin.get("fill"), str)
    return name not in subject.changed and not (subject.dtype == "source" and _moves_only(origin))


def _moves_only(origin: Mapping[str, Any]) -> bool:
    try:
        return Pipeline.parse(origin.get("ops", "")).lossless
    except ValueError:
        return False  # _recomputed says so


def with_errors(comparisons: tuple[Comparison, ...], exact: Answers, rounded: Answers) -> tuple[Comparison, ...]:
    """The comparisons with what rounding does to each output, as information."""
    found = []
    for one in comparisons:
        right, given = (side.get(one.probe, {}).get(one.output) for side in (exact, rounded))
        if right is not None and given is not None:
            error = float(np.abs(given - right).max() / np.abs(right).max())
            one = replace(one, information={**one.information, "rounding_error": error})
        found.append(one)
    return tuple(found)


def nearest(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 values rounded to the nearest of a narrower dtype, even on ties, beyond its range to infinity.

    >>> nearest(np.array([1 + 2**-11, 1 + 3 * 2**-11, 3e-8, 65520.0]), "float16").tolist()
    [1.0, 1.001953125, 5.960464477539063e-08, inf]
    """
    digits, least, most = FORMATS[dtype]
    exponent = np.maximum(np.frexp(values)[1] - 1, least)  # below `least` the steps stay as wide
    step = np.ldexp(1.0, exponent - digits + 1)
    rounded = np.rint(values / step) * step
    return np.where(np.abs(rounded) > most, np.copysign(np.inf, values), rounded)


def _recomputed(name: str, subject: Subject, checkpoint: Checkpoint, given: Any) -> Any:
    """A target's tensor in the source's dtype, or in float64 where an op or a formula calculates it."""
    import torch

    origin = subject.tensors[name]
    try:
        if "from" not in origin:
            return constant(origin["fill"], tuple(given.shape), torch.float64)
        sources = [checkpoint.tensors[source] for source in origin["from"]]
        tensors = [to_torch(source.read(), source.spec) for source in sources]
        part, parts = origin.get("part", (0, 1))
        found: torch.Tensor = Pipeline.parse(origin["ops"]).run(tensors, parts)[part]
    except (AttributeError, KeyError, IndexError, TypeError, OpError, ValueError) as error:
        problem = f"does not give it as conversion.json says: {printable(str(error))}"
        raise CheckpointError(problem, file=checkpoint.path, tensor=name) from error
    return found


def _is_rounded(given: Any, right: Any, dtype: str) -> bool:
    """Bit for bit, where any NaN is as good as another."""
    mine, theirs = given.double().numpy(), nearest(right.double().numpy(), dtype)
    same = (mine == theirs) & (np.signbit(mine) == np.signbit(theirs))
    return str(given.dtype) == f"torch.{dtype}" and given.shape == right.shape and bool((same | np.isnan(theirs)).all())
