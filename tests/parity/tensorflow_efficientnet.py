"""Write a name-based TensorFlow checkpoint of an EfficientNet, by TensorFlow's own saver, and a recording beside it.

    python tensorflow_efficientnet.py FOLDER SIZE

The graph that the original checkpoints were trained with is not installable, so Keras's implementation computes
the reference: the same function, without its preprocessing. Every variable takes the name that the TPU graph
gave it, and an averaged twin, `NAME/ExponentialMovingAverage`; the raw one is set to 7, so that only a reader of
the averages can pass. A slot and a step counter are added, as training leaves them.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

BLOCK = {
    "expand_conv": "conv2d",
    "dwconv": "depthwise_conv2d",
    "se_reduce": "se/conv2d",
    "se_expand": "se/conv2d_1",
}
ENDS = {
    "stem_conv": "stem/conv2d",
    "stem_bn": "stem/tpu_batch_normalization",
    "top_conv": "head/conv2d",
    "top_bn": "head/tpu_batch_normalization",
    "predictions": "head/dense",
}


def tpu_names(layers: list[str]) -> dict[str, str]:
    """Keras's layer names -> the TPU graph's scopes."""
    blocks = list(dict.fromkeys(found[1] for name in layers if (found := re.match(r"(block\d[a-z])_", name))))
    names = dict(ENDS)
    for layer in layers:
        found = re.fullmatch(r"(block\d[a-z])_(\w+)", layer)
        if not found:
            continue
        expands = f"{found[1]}_expand_conv" in layers
        norms = ["expand_bn"] * expands + ["bn", "project_bn"]
        scope = f"blocks_{blocks.index(found[1])}/"
        if found[2] in norms:
            place = norms.index(found[2])
            names[layer] = scope + "tpu_batch_normalization" + (f"_{place}" if place else "")
        elif found[2] == "project_conv":
            names[layer] = scope + ("conv2d_1" if expands else "conv2d")
        elif found[2] in BLOCK:
            names[layer] = scope + BLOCK[found[2]]
    return names


def main(folder: Path, size: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[2] / "converters" / "verifier" / "references"))
    from random_checkpoints import write_checkpoint

    weights = folder / "keras.weights.h5"
    args = {"classes": 10, "classifier_activation": None, "input_shape": [size, size, 3]}
    model = {"application": "EfficientNetB0", "args": args}
    write_checkpoint({"framework": "keras", "model": model, "seed": 3}, weights)

    import keras
    import numpy as np
    import tensorflow as tf
    from run_keras import build_model

    net = build_model(model, "float64")
    net.load_weights(weights)
    variables = {}
    scopes = tpu_names([layer.name for layer in net.layers])
    for layer in net.layers:
        for variable in layer.weights:
            if layer.name in scopes:
                role = "depthwise_kernel" if layer.name.endswith("dwconv") else variable.name
                value = np.asarray(variable, "float32")
                name = f"efficientnet-b0/{scopes[layer.name]}/{role}"
                variables[f"{name}/ExponentialMovingAverage"] = value
                variables[name] = np.full_like(value, 7)
                variables[f"{name}/RMSProp"] = np.ones_like(value)
    variables["global_step"] = np.int64(350)
    prefix = folder / "model.ckpt"
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(variables),
        shape_and_slices=[""] * len(variables),
        tensors=list(variables.values()),
    )

    graph = keras.Model(net.get_layer("normalization").output, net.output)
    probe = np.random.default_rng(0).standard_normal((2, 3, size, size)).astype("float32")
    logits = np.asarray(graph(probe.transpose(0, 2, 3, 1).astype("float64"), training=False))
    files = sorted(folder.glob("model.ckpt.*"))
    lines = "".join(f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}\n" for file in files)
    about = {
        "recording": 1,
        "runner": "keras",
        "model": model,
        "source": {"file": prefix.name, "sha256": hashlib.sha256(lines.encode()).hexdigest()},
        "framework": {"tensorflow": tf.__version__, "keras": keras.__version__},
        "notes": [],
    }
    np.savez(
        folder / "recording.npz",
        **{"about": np.array(json.dumps(about)), "input.normal": probe, "float64.normal.logits": logits},
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
