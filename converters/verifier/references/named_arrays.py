"""What the runners share whose models are arrays by name: TensorFlow's graphs and Flax's modules.

Such a model is a NamedArrays: it knows the shape of each array, takes statistics of a batch, and has the framework's
own saver write what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["NamedArrays", "draw", "unprefixed"]

GAINS = ("scale", "gamma")
VARIANCES = ("moving_variance", "var")


class NamedArrays:
    """A model by its arrays."""

    shapes: dict[str, tuple[int, ...]]

    def statistics(self, arrays: Mapping[str, np.ndarray], batch: np.ndarray) -> dict[str, np.ndarray]:
        """Mean and variance of this batch (NCHW), by the names of the arrays that hold such; none if none do."""
        return {}

    def save(self, arrays: Mapping[str, np.ndarray], path: str) -> None:
        """Write the arrays as the framework does."""
        raise TypeError(f"{type(self).__name__} cannot write {len(arrays)} arrays to {path}")

    def write(self, path: str, seed: int, batch: np.ndarray) -> None:
        """Write arrays that hide nothing; see random_weights.py."""
        rng = np.random.default_rng(seed)
        arrays = {name: draw(rng, name, shape) for name, shape in self.shapes.items()}
        for name, value in self.statistics(arrays, batch).items():
            if name.rpartition("/")[2] in VARIANCES:
                arrays[name] = (value * rng.uniform(0.7, 1.4, value.shape)).astype("float32")
            else:
                arrays[name] = (value + rng.standard_normal(value.shape) * np.abs(value).mean() / 3).astype("float32")
        self.save(arrays, path)


def draw(rng: Any, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array's values by its role, which is the last segment of its name.

    >>> draw(np.random.default_rng(0), "conv/kernel", (3, 3, 4, 8)).std().round(1)
    np.float32(0.2)
    """
    role = name.rpartition("/")[2]
    if role in GAINS or role in VARIANCES:
        values = rng.uniform(0.5, 1.5, shape)
    elif len(shape) > 1 and ("kernel" in role or "weights" in role):
        depthwise = "depthwise" in role and len(shape) > 2
        leads_out = len(shape) == 3 and name.split("/")[-2] == "out"  # heads and their channels -> width
        inputs = shape[:1] if len(shape) == 3 and not leads_out else shape[:2] if depthwise else shape[:-1]
        values = rng.standard_normal(shape) / np.prod(inputs) ** 0.5
    else:
        values = rng.standard_normal(shape) * (0.5 if len(shape) > 2 else 0.2)
    return values.astype("float32")


def unprefixed(arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """The arrays that these names stand for, below whichever prefix has them all. Raises ValueError."""
    first = next(iter(shapes))
    prefixes = [name[: -len(first)] for name in arrays if name == first or name.endswith("/" + first)]
    for prefix in sorted(prefixes, key=len):
        if all(prefix + name in arrays for name in shapes):
            found = {name: arrays[prefix + name] for name in shapes}
            for name, array in found.items():
                if array.shape != tuple(shapes[name]):
                    raise ValueError(f"{prefix}{name} is {array.shape} in the file and {shapes[name]} in the model")
            return found
    missing = [name for name in shapes if name not in arrays]
    raise ValueError(f"the checkpoint does not fill the model: it lacks {', '.join(missing[:3]) or first}")
