"""Checkpoints of real frameworks with weights that hide nothing (see references/random_weights.py).

write_checkpoint({"framework": "mmdet", "model": {"type": "ResNet", "depth": 18}}, path)
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.verifier.worker import Workers, run_task

__all__ = ["write_checkpoint"]


def write_checkpoint(spec: Mapping[str, Any], out: Path, workers: Workers | None = None) -> Path:
    """Write the checkpoint at `out`, whose suffix chooses Keras's form: .weights.h5, .keras or .h5.

    `framework` is the runner; `wrap: detector` puts the model under `backbone.`, beside a neck and a head.
    """
    prefix = "backbone." if spec.get("wrap") == "detector" else ""
    job = {"task": "write_weights", "runner": spec["framework"], "prefix": prefix, **spec, "out": str(out.absolute())}
    run_task(job, workers=workers)
    return out
