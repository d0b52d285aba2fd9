"""Probes: the inputs on which both models are compared.

Their values are float32, so that a float64 run sees the very same numbers. Samples of a batch differ, so that
an output which hardly depends on the input shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ConverterError, printable

__all__ = ["image_probes", "probes"]

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
MOST_IMAGES = 16
LEAVES = 300


def probes(
    shape: tuple[int, int, int], *, any_size: bool = False, few: bool = False, batch: int = 2, seed: int = 0
) -> dict[str, np.ndarray]:
    """Inputs for a model that takes images of `shape` (channels, height, width), scaled as normalised images are.

    `normal` is seeded noise. `ramp` is smooth: each channel of each sample climbs in a direction of its own, so
    that a flip, a transposition, an exchange of channels or padding on the wrong side moves every output.
    `picture` has edges and scales as photographs have, and in its last sample one colour all over, where only
    padding tells places apart. `odd`, for models that take `any_size`, is noise with odd sides of two lengths.
    A `few` are `mixed`, a sample of noise and a picture, and `odd`.

    >>> {name: (x.shape, str(x.dtype)) for name, x in probes((3, 8, 6)).items()}
    {'normal': ((2, 3, 8, 6), 'float32'), 'ramp': ((2, 3, 8, 6), 'float32'), 'picture': ((2, 3, 8, 6), 'float32')}
    >>> probes((3, 224, 224), any_size=True)["odd"].shape
    (2, 3, 169, 141)
    """
    channels, height, width = shape
    rng = np.random.default_rng(seed)
    found = {
        "normal": rng.standard_normal((batch, *shape), dtype=np.float32),
        "ramp": _ramp(batch, *shape),
        "picture": np.stack([_leaves(rng, *shape) for _ in range(batch - 1)] + [_plain(*shape)]),
    }
    if any_size:
        sides = height * 3 // 4 | 1, width * 5 // 8 | 1
        found["odd"] = rng.standard_normal((batch, channels, *sides), dtype=np.float32)
    if few:
        mixed = np.concatenate([found.pop("normal")[:1], found.pop("picture")[:1]])
        found = {"mixed": mixed, **{name: probe for name, probe in found.items() if name == "odd"}}
    return found


def image_probes(directory: Path, images: Path) -> dict[str, np.ndarray]:
    """The user's images, prepared as the emitted folder's config.json says: {"images": NCHW}.

    At most 16 are taken, in order of their names. Raises ConverterError.
    """
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    paths = sorted(path for path in images.glob("*") if path.suffix.lower() in IMAGES)[:MOST_IMAGES]
    if not paths:
        raise ConverterError("holds no images", file=images, cure=f"put files there that end in {', '.join(IMAGES)}")
    config = json.loads((directory / "config.json").read_text("utf-8"))["pretrained_cfg"]
    prepare: Any = create_transform(**resolve_data_config({}, pretrained_cfg=config))
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    found = []
    for path in paths:
        try:
            with Image.open(path) as image:
                found.append(prepare(image.convert(mode)).numpy())
        except Exception as error:  # the decoders raise many kinds
            raise ConverterError(f"is no image: {printable(str(error))}", file=path, cure="take it away") from error
    return {"images": np.stack(found)}


def _ramp(batch: int, channels: int, height: int, width: int) -> np.ndarray:
    sample, channel, y, x = np.ogrid[:batch, :channels, -1 : 1 : height * 1j, -1 : 1 : width * 1j]
    direction = 0.5 + sample + 2 * channel  # radians: no two alike, none along an axis or a diagonal
    return (np.cos(direction) * x + np.sin(direction) * y + 0.3 * channel - 0.2 * sample).astype(np.float32)


def _leaves(rng: np.random.Generator, channels: int, height: int, width: int) -> np.ndarray:
    """Discs that hide each other, their radii by a power law: the model of photographs called "dead leaves"."""
    y, x = np.ogrid[:height, :width]
    picture = np.zeros((channels, height, width))
    for size in rng.uniform(0.002, 1, LEAVES):
        radius = 0.02 * max(height, width) / size**0.5
        inside = (y - rng.uniform(0, height)) ** 2 + (x - rng.uniform(0, width)) ** 2 < radius**2
        shade, colour, slope = rng.standard_normal(), rng.standard_normal(channels) / 3, rng.normal(0, 0.3, 2)
        light = shade + slope[0] * y / height + slope[1] * x / width
        picture[:, inside] = (light + colour[:, None, None])[:, inside]
    return picture.astype(np.float32)


def _plain(channels: int, height: int, width: int) -> np.ndarray:
    return np.broadcast_to(0.6 - 0.4 * np.ogrid[:channels, :1, :1][0], (channels, height, width)).astype(np.float32)
