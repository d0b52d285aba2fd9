"""Every form of checkpoint that Keras itself writes, and what it holds.

    python forms.py OUT

writes `OUT/FORM` and `OUT/expected.json`: model -> name -> [dtype, shape, bytes in hex], taken from the live layers'
attributes. Files of Keras before 3.6, which did not store names, are made by taking the names away.
Tests run this in a child process, because TensorFlow cannot share one with triton.
"""

import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # pytest imports this module to look for doctests, and must not meet TensorFlow
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"}
    import h5py
    import keras
    from keras import layers
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

rng = np.random.default_rng(0)


def nested(name):
    """A model for within a model; every one has a layer called `shared`."""
    image = keras.Input((8, 8, 4))
    x = layers.Conv2D(4, 3, padding="same", name=f"{name}_conv")(image)
    return keras.Model(image, layers.BatchNormalization(name="shared")(x), name=name)


def zoo():
    """One of each layer that vision models are made of, most with names that Keras gives them."""
    layers.Conv2D(1, 1), layers.BatchNormalization()  # so that automatic names do not begin at zero
    x = image = keras.Input((8, 8, 3))
    x = layers.Normalization(name="norm")(x)
    for _ in range(11):  # more than ten: conv2d_10 sorts before conv2d_2
        x = layers.Conv2D(4, 3, padding="same", use_bias=False)(x)
    x = layers.BatchNormalization()(x)
    x = layers.BatchNormalization(scale=False)(x)
    x = layers.BatchNormalization(center=False, name="no_beta")(x)
    x = layers.BatchNormalization(scale=False, center=False)(x)
    x = layers.Conv2D(4, 3, padding="same", name="named")(x)
    x = keras.ops.add(layers.DepthwiseConv2D(3, padding="same")(x), 1.0)
    x = layers.SeparableConv2D(4, 3, padding="same")(x)
    x = nested("left")(nested("right")(x))
    x = keras.Sequential([layers.LayerNormalization(), layers.Conv2D(4, 1, name="inner")], name="stem")(x)
    x = layers.GroupNormalization(2)(layers.PReLU()(layers.Dropout(0.1)(x)))
    x = layers.Reshape((64, 4))(x)
    x = layers.MultiHeadAttention(2, 2, name="attention")(x, x)
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(image, layers.Dense(3, dtype="bfloat16")(x))


def trained():
    model = keras.Sequential([keras.Input((4, 4, 1)), layers.Conv2D(2, 3), layers.Flatten(), layers.Dense(2)])
    model.compile("adam", "mse")
    model.fit(np.ones((2, 4, 4, 1)), np.ones((2, 2)), verbose=0)
    return model


def randomize(model):
    for variable in model.variables:
        if "float" in variable.dtype:
            variable.assign(rng.standard_normal(variable.shape))


def expected(model, prefix=""):
    """The variables by layer and role; `shared` is called after the model that it lies in, too."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found |= expected(layer, f"{layer.name}/")
            continue
        for variable in layer.weights:
            value = np.asarray(keras.ops.convert_to_numpy(variable))
            name = variable.path if isinstance(layer, layers.MultiHeadAttention) else f"{layer.name}/{variable.name}"
            name = prefix + name if layer.name == "shared" else name
            found[name] = [variable.dtype, list(value.shape), value.tobytes().hex()]
    return found


def forget_names(data):
    """A .weights.h5 as Keras wrote it before 3.6."""
    stream = io.BytesIO(data)
    with h5py.File(stream, "r+") as file:
        groups = []
        file.visititems(lambda _, item: groups.append(item))
        for group in groups:
            if "name" in group.attrs:
                del group.attrs["name"]
    return stream.getvalue()


def repack(source, target, method=zipfile.ZIP_STORED, change=lambda data: data):
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for member in old.namelist():
            data = old.read(member)
            new.writestr(member, change(data) if member.endswith(".h5") else data)


def main(out):
    models = {"zoo": zoo(), "trained": trained()}
    for name, model in models.items():
        randomize(model)
        model.save_weights(out / f"{name}.weights.h5")
        model.save_weights(
            out / f"{name}.weights.json", max_shard_size=1.2e-6
        )  # GiB: a layer may lie across two shards
        model.save(out / f"{name}.keras")
        model.save(out / f"{name}.h5")
        with h5py.File(out / f"{name}.legacy.h5", "w") as file:
            save_weights_to_hdf5_group(file, model)
    repack(out / "zoo.keras", out / "zoo.nameless.keras", change=forget_names)
    repack(out / "zoo.keras", out / "zoo.deflated.keras", zipfile.ZIP_DEFLATED)
    (out / "zoo.nameless.weights.h5").write_bytes(forget_names((out / "zoo.weights.h5").read_bytes()))
    (out / "expected.json").write_text(json.dumps({name: expected(model) for name, model in models.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
