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
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, printable

__all__ = ["Subject", "read_subject"]


@dataclass(frozen=True)
class Subject:
    """An emitted folder."""

    directory: Path
    family: str
    sha256: str  # of the source that was converted
    reference: dict[str, Any] | None  # the block; None where the family names no reference
    input_size: tuple[int, int, int]  # channels, height, width

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
        reference = conversion.get("reference")
        if reference and not {"runner", "model", "outputs"} <= reference.keys():
            raise KeyError("runner, model and outputs of its reference")
        return Subject(
            directory,
            str(conversion["family"]),
            str(conversion["source"]["sha256"]),
            reference or None,
            (int(channels), int(height), int(width)),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"lacks what a verification needs: {printable(str(error))}", file=directory) from error


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
