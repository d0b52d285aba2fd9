"""Reference runner for ONNX graphs, by onnxruntime on the CPU, in float32.

`model` is {"file": PATH, "layout": "nchw" or "nhwc"}; without a file the checkpoint itself is the graph. It takes
one input, the probe. The weights are the graph's own. Outputs: the graph's, by name or by position.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["build"]


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """A session of the graph."""
    if precision != "float32":
        raise TypeError("an ONNX graph has the precision that it was exported in")
    import onnxruntime

    path = job["model"].get("file") or job["source"]["file"]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # as it was exported
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    inputs, names = session.get_inputs(), [output.name for output in session.get_outputs()]
    if len(inputs) != 1:
        raise ValueError(f"the graph takes {len(inputs)} inputs ({', '.join(one.name for one in inputs)}), not one")
    last = job["model"].get("layout", "nchw") == "nhwc"

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        x = np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if last else x
        given = session.run(None, {inputs[0].name: x})
        return {**{str(number): value for number, value in enumerate(given)}, **dict(zip(names, given))}  # noqa: B905

    return run, {"files": [path, *filter(os.path.exists, (path + ".data", path + "_data"))]}
