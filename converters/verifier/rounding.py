"""The gate for weights that are rounded, to a narrower dtype or after a calculation: each is the source's through the
plan's ops, rounded once.

The forward pass of rounded weights cannot agree with the reference's, so it decides nothing. The source's own
values are made once more, as conversion.json says, compared with the stored ones bit for bit, and run in their
place: then the function is compared as sharply as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from converters.errors import CheckpointError, printable
from converters.ops import CALCULATING, OpError, Pipeline
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
    "float64": (53, -1022, (2 - 2.0**-52) * 2.0**1023),
}


def unrounded(subject: Subject, checkpoint: Checkpoint) -> tuple[dict[str, Any], Rounding | None]:
    """The tensors that were rounded, as they are before that, and whether they were rounded well.

    None where the conversion kept the source's dtype and calculated nothing. Raises CheckpointError.
    """
    calculated = {
        name
        for name, origin in subject.tensors.items()
        if CALCULATING & {op.split()[0] for op in origin.get("ops", "").split("|") if op.strip()}
    }
    if subject.dtype == "source" and not calculated:
        return {}, None
    from safetensors import safe_open

    exact: dict[str, Any] = {}
    wrong, count, dtypes = [], 0, set[str]()
    path = subject.directory / "model.safetensors"
    with safe_open(path, "pt") as stored:
        names = set(stored.keys())
        for name, origin in subject.tensors.items():
            if "from" not in origin or (subject.dtype == "source" and name not in calculated):
                continue
            given = stored.get_tensor(name) if name in names else None
            right = _recomputed(name, subject, checkpoint)
            dtype = str(right.dtype).removeprefix("torch.") if subject.dtype == "source" else subject.dtype
            if not right.is_floating_point():
                continue
            if name not in calculated and given is not None and given.dtype == right.dtype:
                continue
            count += 1
            dtypes.add(dtype)
            exact[name] = _recomputed(name, subject, checkpoint, exactly=True) if name in calculated else right
            if given is None or not _is_rounded(given, right, dtype):
                wrong.append(name)
    return exact, Rounding(", ".join(sorted(dtypes)) or subject.dtype, count, tuple(wrong))


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


def _recomputed(name: str, subject: Subject, checkpoint: Checkpoint, *, exactly: bool = False) -> Any:
    """A target's tensor in the source's dtype, or in float64."""
    import torch

    origin = subject.tensors[name]
    try:
        sources = [checkpoint.tensors[source] for source in origin["from"]]
        tensors = [to_torch(source.read(), source.spec) for source in sources]
        tensors = [tensor.double() for tensor in tensors] if exactly else tensors
        part, parts = origin.get("part", (0, 1))
        found: torch.Tensor = Pipeline.parse(origin["ops"]).run(tensors, parts)[part]
    except (KeyError, IndexError, TypeError, OpError, ValueError) as error:
        problem = f"does not give it as conversion.json says: {printable(str(error))}"
        raise CheckpointError(problem, file=checkpoint.path, tensor=name) from error
    return found


def _is_rounded(given: Any, right: Any, dtype: str) -> bool:
    """Bit for bit, where any NaN is as good as another."""
    mine, theirs = given.double().numpy(), nearest(right.double().numpy(), dtype)
    same = (mine == theirs) & (np.signbit(mine) == np.signbit(theirs))
    return str(given.dtype) == f"torch.{dtype}" and given.shape == right.shape and bool((same | np.isnan(theirs)).all())
