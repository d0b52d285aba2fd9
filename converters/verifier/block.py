"""The reference block: which model of the source framework answers, and how its answers read in timm's terms.

    {"runner": "mmdet", "model": {"type": "SwinTransformer", ...},
     "outputs": {"features.0": "0", "forward_features": "3 | b c h w -> b h w c"}}

`model` is what the runner builds. `outputs` gives for each of timm's outputs the reference's name of it and the
ops that lay it out as timm's; `input`, likewise, the ops that make timm's input of the reference's (`flip 1`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ReferenceFailed, printable
from converters.ops import IDENTITY, OpError, Pipeline
from converters.verifier.recording import Activations, Recording

__all__ = ["Block", "parse_block"]


@dataclass(frozen=True)
class Block:
    """A parsed reference block."""

    runner: str
    model: Mapping[str, Any]
    outputs: Mapping[str, tuple[str, Pipeline]]  # timm's name: the reference's, and ops
    input: Pipeline = IDENTITY

    @classmethod
    def of(cls, recording: Recording) -> Block:
        """The block of a recording that speaks timm's terms already."""
        names = dict.fromkeys(
            name for probes in recording.outputs.values() for outputs in probes.values() for name in outputs
        )
        return cls(str(recording.about.get("runner")), {}, {name: (name, IDENTITY) for name in names})

    @property
    def wanted(self) -> list[str]:
        """The reference's outputs that must be there."""
        return list(dict.fromkeys(name for name, _ in self.outputs.values()))

    def inputs(self, recording: Recording) -> dict[str, np.ndarray]:
        """What the target must be given for each probe."""
        return {probe: _apply(self.input, array, f"probe {probe}") for probe, array in recording.inputs.items()}

    def activations(self, recording: Recording) -> Activations:
        """The reference's outputs by timm's names; what the reference does not have is left out."""
        return {
            precision: {
                probe: {
                    name: _apply(ops, outputs[theirs], f"output {theirs}")
                    for name, (theirs, ops) in self.outputs.items()
                    if theirs in outputs
                }
                for probe, outputs in probes.items()
            }
            for precision, probes in recording.outputs.items()
        }


def parse_block(document: Any, file: Path) -> Block:
    """The block that lies in `file` as `document`. Raises ReferenceFailed."""
    try:
        block = Block(
            runner=str(document["runner"]),
            model=dict(document["model"]),
            outputs={name: _source(text) for name, text in document["outputs"].items()},
            input=Pipeline.parse(document.get("input", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        problem = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise ReferenceFailed(f"its reference is malformed: {printable(problem)}", file=file) from error
    return block


def _source(text: str) -> tuple[str, Pipeline]:
    name, _, ops = text.partition("|")
    return name.strip(), Pipeline.parse(ops)


def _apply(ops: Pipeline, array: np.ndarray, what: str) -> np.ndarray:
    if not ops.ops:
        return array
    import torch

    try:
        return ops.run([torch.from_numpy(np.array(array))])[0].contiguous().numpy()
    except OpError as error:
        raise ReferenceFailed(f"the reference's {printable(what)}: {error}") from error
