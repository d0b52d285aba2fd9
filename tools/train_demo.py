"""Train the demo's checkpoint and record what the framework itself computes with it.

The demo needs a checkpoint that somebody really trained: random weights would show that the arithmetic agrees,
but not that a converted model still recognises anything. scikit-learn ships 1,797 handwritten digits (8x8
pixels, values 0 to 16), so this data needs no download, and a reader can tell at a glance whether an answer is
right. Keras's own MobileNetV2 learns them in a couple of minutes on two cores, and has what makes a
conversion worth showing: depthwise kernels, asymmetric padding before its strided convolutions, and a batch
normalization whose epsilon is not timm's.

Each pixel is repeated 4x4 to give 32x32, and scaled to [-1, 1] (Keras's "tf" preprocessing): value / 8 - 1, which is
exact in float32. 400 images, fixed by the seed, are never trained on; the recording holds them, their labels,
and the logits of the saved file in float64 and in float32.

Writes `digits.weights.h5` (by Keras's own saver) and `digits.recording.npz` (see `record`).
Needs tensorflow, keras and scikit-learn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from sklearn.datasets import load_digits

__all__ = ["main"]

HELD_OUT = 400
BATCH = 64
MODEL: dict[str, Any] = {
    "application": "MobileNetV2",
    "args": {
        "alpha": 0.35,
        "weights": None,
        "classes": 10,
        "classifier_activation": None,
        "input_shape": [32, 32, 1],
    },
}

Images = NDArray[np.float32]  # (N, H, W, C), as Keras lays them out
Labels = NDArray[np.int64]  # (N,)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo's checkpoint and record its logits.")
    parser.add_argument("--out", type=Path, default=Path("converters/demo"), help="folder to write (%(default)s)")
    parser.add_argument("--epochs", type=int, default=80, help="passes over the data (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the split, the weights and the shifts (%(default)s)")
    args = parser.parse_args()

    keras.utils.set_random_seed(args.seed)
    tf.config.experimental.enable_op_determinism()
    args.out.mkdir(parents=True, exist_ok=True)
    weights, recording = args.out / "digits.weights.h5", args.out / "digits.recording.npz"

    train, held_out = load_data(args.seed)
    save(fit(train, args.epochs, args.seed), weights)
    record(weights, held_out, recording)
    for path in (weights, recording):
        print(f"wrote {path}: {path.stat().st_size:,} bytes")


def load_data(seed: int) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """The digits as Keras wants them, (images, labels) to train on and the same held out."""
    digits = load_digits()
    images = np.repeat(np.repeat(digits.images, 4, axis=1), 4, axis=2)[..., None]
    images = (images / 16 * 255 / 127.5 - 1).astype(np.float32)
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    held_out, train = order[:HELD_OUT], order[HELD_OUT:]
    return (images[train], labels[train]), (images[held_out], labels[held_out])


def build() -> keras.Model:
    return getattr(keras.applications, MODEL["application"])(**MODEL["args"])


def fit(data: tuple[Images, Labels], epochs: int, seed: int) -> keras.Model:
    images, labels = data
    model = build()
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9  # the constructor's 0.999 needs thousands of steps to forget its start
    steps = epochs * -(-len(labels) // BATCH)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, alpha=0.01, warmup_target=3e-3, warmup_steps=steps // 10
    )
    model.compile(
        optimizer=keras.optimizers.Adam(schedule),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    rng, start = np.random.default_rng(seed), time.monotonic()
    for epoch in range(1, epochs + 1):
        history = model.fit(shifted(images, rng), labels, batch_size=BATCH, verbose=0).history
        if epoch % 10 == 0 or epoch == epochs:
            loss, accuracy = history["loss"][-1], history["accuracy"][-1]
            print(
                f"epoch {epoch}: loss {loss:.4f}, accuracy {accuracy:.4f}, {time.monotonic() - start:.0f} s", flush=True
            )
    return model


def shifted(images: Images, rng: np.random.Generator) -> Images:
    """Each image moved by up to 2 of its 32 pixels; what moves in is background."""
    reach, (n, height, width, _) = 2, images.shape
    padded = np.pad(images, ((0, 0), (reach, reach), (reach, reach), (0, 0)), constant_values=-1)
    corners = rng.integers(0, 2 * reach + 1, (n, 2))
    return np.stack([image[y : y + height, x : x + width] for image, (y, x) in zip(padded, corners, strict=True)])


def save(model: keras.Model, path: Path) -> None:
    """The weights alone: a compiled model would save Adam's moments too, three times the size."""
    plain = build()
    plain.set_weights(model.get_weights())
    plain.save_weights(path)


def record(weights: Path, data: tuple[Images, Labels], path: Path) -> None:
    """Write what Keras computes with the saved file: inputs NCHW, logits (N, classes), labels (N,)."""
    images, labels = data
    logits = {dtype: predict(weights, images, dtype) for dtype in ("float64", "float32")}
    accuracy = float(np.mean(logits["float64"].argmax(1) == labels))
    apart = float(np.abs(logits["float64"] - logits["float32"]).max() / np.abs(logits["float64"]).max())
    spread = float(logits["float64"].std(0).min())
    print(f"held out: {len(labels)} images, accuracy {accuracy:.4f}")
    print(f"logits: float32 differs from float64 by {apart:.1e} of the largest; least standard deviation {spread:.2f}")
    if accuracy < 0.96 or apart > 5e-6 or spread < 0.1:
        raise SystemExit("this is not a checkpoint to ship: too inaccurate, or its logits are not to be trusted")
    about = {
        "recording": 1,
        "runner": "keras",
        "framework": {"keras": keras.__version__, "tensorflow": tf.__version__},
        "source": {"file": weights.name, "sha256": hashlib.sha256(weights.read_bytes()).hexdigest()},
        "model": MODEL,
    }
    arrays: dict[str, Any] = {
        "about": np.array(json.dumps(about)),
        "input.digits": np.ascontiguousarray(images.transpose(0, 3, 1, 2)),
        "float64.digits.logits": logits["float64"],
        "float32.digits.logits": logits["float32"],
        "labels.digits": labels,
    }
    np.savez_compressed(path, **arrays)


def predict(weights: Path, images: Images, dtype: str) -> NDArray[Any]:
    """The logits of a model built anew in `dtype`, in inference mode."""
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    model = build()
    model.load_weights(weights)
    logits: NDArray[Any] = model.predict(images.astype(dtype), batch_size=100, verbose=0)
    if logits.dtype != dtype:
        raise SystemExit(f"Keras computed in {logits.dtype}, not in {dtype}")
    return logits


if __name__ == "__main__":
    main()
