"""Probes: the inputs on which both models are compared.

Their values are float32, so that a float64 run sees the very same numbers. Samples of a batch differ, so that
an output which hardly depends on the input shows.
"""

from __future__ import annotations

import numpy as np

__all__ = ["probes"]


def probes(shape: tuple[int, int, int], *, batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs for a model that takes images of `shape` (channels, height, width), scaled as normalised images are.

    `normal` is seeded noise. `ramp` is smooth: each channel of each sample climbs in a direction of its own, so
    that a flip, a transposition, an exchange of channels or padding on the wrong side moves every output.

    >>> {name: (x.shape, str(x.dtype)) for name, x in probes((3, 8, 6)).items()}
    {'normal': ((2, 3, 8, 6), 'float32'), 'ramp': ((2, 3, 8, 6), 'float32')}
    """
    normal = np.random.default_rng(seed).standard_normal((batch, *shape), dtype=np.float32)
    return {"normal": normal, "ramp": _ramp(batch, *shape)}


def _ramp(batch: int, channels: int, height: int, width: int) -> np.ndarray:
    sample, channel, y, x = np.ogrid[:batch, :channels, -1 : 1 : height * 1j, -1 : 1 : width * 1j]
    direction = 0.5 + sample + 2 * channel  # radians: no two alike, none along an axis or a diagonal
    return (np.cos(direction) * x + np.sin(direction) * y + 0.3 * channel - 0.2 * sample).astype(np.float32)
