"""The subject of a verification: what the emitted folder says of itself and of its source.

Its reference block says which model of the source framework answers, and what its answers are in timm:

    {"runner": "mmdet", "model": {"type": ..., "depth": ...},
     "outputs": {"features.0": "0", "forward_features": "3 | b c h w -> b h w c"}}

`model` is what the runner builds. `outputs` gives for each of timm's outputs (see target.py) the runner's name of
it and the ops that lay it out as timm's; `input`, likewise, ops that make timm's input of the reference's.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, printable
from converters.verifier.taps import Pair, read_pairs

__all__ = ["Subject", "make_subject", "read_subject"]


@dataclass(frozen=True)
class Subject:
    """An emitted folder."""

    directory: Path
    family: str
    sha256: str  # of the source that was converted
    reference: dict[str, Any] | None  # the block; None where the family names no reference
    input_size: tuple[int, int, int]  # channels, height, width
    num_classes: int = 0
    key: str | None = None  # which of the source's state dicts was asked for
    ema: bool | None = None
    dtype: str = "source"
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)  # where each comes from
    modules: tuple[Pair, ...] = ()
    deviation: tuple[dict[str, Any], ...] = ()
    changes: tuple[str, ...] = ()  # on request, so that no model of the source framework computes its features
    changed: frozenset[str] = frozenset()  # tensors of a classifier that is not the source's

    def about(self) -> dict[str, Any]:
        """What is verified, and by which libraries it is run."""
        weights = hashlib.sha256()
        with (self.directory / "model.safetensors").open("rb") as file:
            while piece := file.read(8 << 20):
                weights.update(piece)
        return {"weights_sha256": weights.hexdigest(), "timm": version("timm"), "torch": version("torch")}


def read_subject(directory: Path) -> Subject:
    """The folder's conversion.json and config.json, as far as a verification needs them. Raises CheckpointError."""
    conversion, config = _read(directory / "conversion.json"), _read(directory / "config.json")
    try:
        channels, height, width = config["pretrained_cfg"]["input_size"]
        size = int(channels), int(height), int(width)
        return make_subject(directory, conversion, size, int(config.get("num_classes", 0)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"lacks what a verification needs: {printable(str(error))}", file=directory) from error


def make_subject(
    directory: Path, conversion: Mapping[str, Any], input_size: tuple[int, int, int], num_classes: int
) -> Subject:
    """What a conversion.json says. Raises AttributeError, KeyError, TypeError or ValueError."""
    source, reference = conversion["source"], conversion.get("reference")
    if reference and not {"runner", "model", "outputs"} <= reference.keys():
        raise KeyError("runner, model and outputs of its reference")
    key, ema = source.get("key"), source.get("ema")
    return Subject(
        directory,
        str(conversion["family"]),
        str(source["sha256"]),
        reference or None,
        input_size,
        num_classes=num_classes,
        key=None if key is None else str(key),
        ema=None if ema is None else bool(ema),
        dtype=str(conversion.get("dtype", "source")),
        tensors=dict(conversion.get("tensors", {})),
        modules=read_pairs(conversion.get("modules", {})),
        deviation=tuple(map(_deviation, conversion.get("deviation", ()))),
        changes=tuple(str(one["text"]) for one in conversion.get("changes", ()) if one["inside"]),
        changed=frozenset(str(name) for one in conversion.get("changes", ()) for name in one["tensors"]),
    )


def _deviation(one: dict[str, Any]) -> dict[str, Any]:
    values = {name: one[name] for name in ("attribute", "source", "target")}
    return {**values, "where": list(map(str, one["where"])), "bound": float(one["bound"]), "reason": str(one["reason"])}


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        problem = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise CheckpointError(problem, file=path, cure="give a folder that convert wrote") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("is not JSON", file=path) from error
    if not isinstance(document, dict):
        raise CheckpointError("is not a JSON object", file=path)
    return document
