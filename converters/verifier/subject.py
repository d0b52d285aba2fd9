"""The subject of a verification: what the emitted folder says of itself and of its source."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError
from converters.verifier.block import Block, parse_block

__all__ = ["Subject", "read_subject"]


@dataclass(frozen=True)
class Subject:
    """An emitted folder."""

    directory: Path
    family: str
    sha256: str  # of the source that was converted
    block: Block | None  # None where the family names no reference
    input_size: tuple[int, int, int]  # channels, height, width

    def about(self) -> dict[str, Any]:
        """What is verified, and by which libraries it is run."""
        with (self.directory / "model.safetensors").open("rb") as file:
            weights = hashlib.sha256()
            for piece in iter(lambda: file.read(8 << 20), b""):
                weights.update(piece)
        return {"weights_sha256": weights.hexdigest(), "timm": version("timm"), "torch": version("torch")}


def read_subject(directory: Path) -> Subject:
    """The folder's conversion.json and config.json, as far as a verification needs them. Raises CheckpointError."""
    file = directory / "conversion.json"
    conversion, config = _read(file), _read(directory / "config.json")
    try:
        reference = conversion.get("reference")
        channels, height, width = config["pretrained_cfg"]["input_size"]
        return Subject(
            directory,
            str(conversion["family"]),
            str(conversion["source"]["sha256"]),
            parse_block(reference, file) if reference else None,
            (int(channels), int(height), int(width)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"lacks what a verification needs ({error})", file=directory) from error


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
