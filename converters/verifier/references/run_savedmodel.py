"""Reference runner for TensorFlow graphs: SavedModels, and TF1's frozen graphs. In float32, as they were saved.

`model` is {"path": FOLDER or GRAPH.pb, "signature": NAME, "input": TENSOR, "layout": "nhwc" or "nchw"}; without a
path the checkpoint itself is it. A graph can read and write files, so it is run for a job with `trust` only.
Outputs: of a SavedModel those of its signature, by name or by position; of a frozen graph any tensor's name
("logits", "block/add:0"), or "0" for its last operation. `input` is the placeholder's name, if there are several.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["build"]


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The graph as a function of a probe."""
    path = os.path.abspath(job["model"].get("path") or job["source"]["file"])
    if not job.get("trust"):
        raise PermissionError(f"{os.path.basename(path)} is a graph, which would be run; allow it with --trust")
    if precision != "float32":
        raise TypeError("a graph has the precision that it was saved in")
    import tensorflow as tf

    ask = _saved(tf, path, job["model"]) if os.path.isdir(path) else _frozen(tf, path, job["model"], job["outputs"])
    first = job["model"].get("layout", "nhwc") == "nchw"

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        given = ask(tf.constant(x if first else x.transpose(0, 2, 3, 1)))
        return {name: value.numpy() for name, value in given.items()}

    return run, {"files": _files(path)}


def _files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    return [os.path.join(folder, name) for folder, _, names in os.walk(path) for name in names]


def _saved(tf: Any, path: str, model: Mapping[str, Any]) -> Any:
    loaded = tf.saved_model.load(path)
    names, wanted = list(loaded.signatures), model.get("signature", "serving_default")
    if wanted not in names:
        raise ValueError(f"the SavedModel has no signature {wanted!r}; it has {', '.join(names) or 'none'}")
    signature = loaded.signatures[wanted]
    inputs = list(signature.structured_input_signature[1])
    if len(inputs) != 1 and model.get("input") not in inputs:
        raise ValueError(f"the signature takes {', '.join(inputs)}; say which is the image with `input`")

    def ask(x: Any) -> Any:
        ask.loaded = loaded  # type: ignore[attr-defined]  # its variables die with it
        given = signature(**{model.get("input", inputs[0]): x})
        return {**{str(number): given[name] for number, name in enumerate(sorted(given))}, **given}

    return ask


def _frozen(tf: Any, path: str, model: Mapping[str, Any], outputs: Any) -> Any:
    definition = tf.compat.v1.GraphDef()
    with open(path, "rb") as file:
        definition.ParseFromString(file.read())
    holders = [node.name for node in definition.node if node.op == "Placeholder"]
    if len(holders) != 1 and "input" not in model:
        raise ValueError(f"the graph has the placeholders {', '.join(holders) or '(none)'}; say which with `input`")
    names = {name: definition.node[-1].name if name == "0" else name for name in outputs}

    def place(name: str) -> str:
        return name if ":" in name else f"{name}:0"

    wrapped = tf.compat.v1.wrap_function(lambda: tf.compat.v1.import_graph_def(definition, name=""), [])
    fetches = {name: wrapped.graph.get_tensor_by_name(place(own)) for name, own in names.items()}
    return wrapped.prune(wrapped.graph.get_tensor_by_name(place(model.get("input", holders[0]))), fetches)
