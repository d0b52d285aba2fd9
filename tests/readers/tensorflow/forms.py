"""Every form of checkpoint that TensorFlow itself writes, each in a folder of its own, and what it holds.

    python forms.py OUT [FORM...]

writes `OUT/FORM/...` and `OUT/expected.json`: FORM -> name -> [dtype, shape, bytes in hex]. In the forms that save by
name, the values are what `tf.train.load_checkpoint` reads back; in the others, what the live variables hold, and in
the first format, of which TensorFlow's own reader refuses slices and float16, what was written.
Tests run this in a child process, because TensorFlow cannot share one with triton.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # pytest imports this module to look for doctests, and must not meet TensorFlow
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": "", "KERAS_BACKEND": "tensorflow"}
    import keras
    import tensorflow as tf

    v1 = tf.compat.v1

rng = np.random.default_rng(0)
random = rng.standard_normal


def loaded(prefix):
    reader = tf.train.load_checkpoint(str(prefix))
    return {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def in_session(out, build, **saver):
    """Run `build` in a graph of its own, give every variable a random value, and save them by name; their values."""
    values = {}
    with tf.Graph().as_default(), v1.Session(config=v1.ConfigProto(device_count={"CPU": 2})) as session:
        build()
        session.run(v1.global_variables_initializer())
        for variable in v1.global_variables():
            value = (9 * random(variable.shape)).astype(variable.dtype.base_dtype.as_numpy_dtype)
            variable.load(value, session)
            if part := variable._get_save_slice_info():
                whole = values.setdefault(part.full_name, np.zeros(part.full_shape, value.dtype))
                whole[tuple(map(slice, part.var_offset, np.add(part.var_offset, part.var_shape)))] = value
            else:
                values[variable.op.name] = value
        v1.train.Saver(**saver).save(session, str(out / "model.ckpt"), global_step=7, write_meta_graph=False)
    return values


def save_v2(out, tensors, slices=None):
    names, values = zip(*tensors, strict=True)
    slices = slices or [""] * len(names)
    tf.raw_ops.SaveV2(prefix=str(out / "m"), tensor_names=names, shape_and_slices=slices, tensors=values)


def saver(out):
    def build():
        with v1.variable_scope("net-b0/stem"):
            kernel = v1.get_variable("conv2d/kernel", (3, 3, 3, 4))
            gamma = v1.get_variable("tpu_batch_normalization/gamma", (4,))
        loss = tf.reduce_sum(kernel) + tf.reduce_sum(gamma)
        step = v1.train.get_or_create_global_step()
        update = v1.train.RMSPropOptimizer(0.1, momentum=0.9).minimize(loss, global_step=step)
        with tf.control_dependencies([update]):
            tf.train.ExponentialMovingAverage(0.9999, num_updates=step).apply([kernel, gamma])

    in_session(out, build)
    return loaded(out / "model.ckpt-7")


def on_two_devices():
    for number in range(2):
        with tf.device(f"/cpu:{number}"):
            v1.get_variable(f"part{number}/kernel", (2, 3 + number))


def sharded(out):
    in_session(out, on_two_devices, sharded=True)
    return loaded(out / "model.ckpt-7")


def partitioned(out):
    def build():
        for name, shape, axis, parts in [("rows", (200, 3), 0, 3), ("columns", (2, 7), 1, 4), ("long", (20000,), 0, 2)]:
            v1.get_variable(f"{name}/kernel", shape, partitioner=v1.fixed_size_partitioner(parts, axis=axis))
        v1.get_variable("whole/kernel", (2, 2))

    in_session(out, build)
    return loaded(out / "model.ckpt-7")


def first(out):
    """The format before bundles: every dtype that it has, a scalar, slices, and more than one block."""

    def build():
        for dtype in (tf.float32, tf.float64, tf.float16, tf.int32, tf.int64, tf.int16, tf.int8, tf.uint8, tf.bool):
            v1.get_variable(f"of_{dtype.name}/kernel", (3, 5), dtype, v1.zeros_initializer())
        v1.get_variable("scalar", ())
        v1.get_variable("columns/kernel", (2, 7), partitioner=v1.fixed_size_partitioner(4, axis=1))
        v1.get_variable("half/kernel", (6,), tf.float16, partitioner=v1.fixed_size_partitioner(2))
        for number in range(3):
            v1.get_variable(f"large_{number}/kernel", (300, 300))

    return in_session(out, build, write_version=v1.train.SaverDef.V1)


def first_sharded(out):
    return in_session(out, on_two_devices, sharded=True, write_version=v1.train.SaverDef.V1)


def quarters(out):
    """A tensor split along two axes, in quarters of four sizes."""
    whole = random((5, 70)).astype("f4")
    parts = [(rows, columns) for rows in ((0, 2), (2, 3)) for columns in ((0, 66), (66, 4))]
    save_v2(
        out,
        [("w", whole[r : r + rows, c : c + columns]) for (r, rows), (c, columns) in parts],
        [f"5 70 {r},{rows}:{c},{columns}" for (r, rows), (c, columns) in parts],
    )
    return loaded(out / "m")


def dtypes(out):
    names = "bfloat16 float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64"
    tensors = [(name, tf.constant(rng.integers(0, 2, (3, 5)), name)) for name in names.split()]
    tensors += [(name, tf.cast(random((3, 5)), name)) for name in ("float8_e4m3fn", "float8_e5m2")]
    tensors += [("scalar", tf.constant(1.5)), ("empty", tf.zeros((0, 3))), ("ünïcode/ β", tf.constant([2.5]))]
    save_v2(out, tensors)
    return loaded(out / "m")


def many(out):
    """So many variables that the index takes several blocks."""
    save_v2(out, [(f"layer_{n}/with_a_long_name/moving_variance", random(2).astype("f4")) for n in range(6000)])
    return loaded(out / "m")


def others(out):
    """What holds no numbers that anyone can use."""
    save_v2(
        out,
        [
            ("text", tf.constant("größe")),
            ("texts", tf.constant([[b"a", b""], [b"b" * 300, b"\xff"]])),
            ("long_text", tf.constant("x" * (2 << 20))),
            ("complex128", tf.constant([1j], tf.complex128)),
            ("variant", tf.raw_ops.EmptyTensorList(element_shape=[2], max_num_elements=1, element_dtype=tf.float32)),
            ("w", tf.constant([1.0, 2.0])),
        ],
    )
    return {"w": np.array([1, 2], "f4")}


def module(out):
    """A tf.Module of named and unnamed variables, saved twice, so that `checkpoint` names the second."""
    net = tf.Module()
    net.dense, net.bare = tf.Variable(random((2, 3)).astype("f4"), name="head/kernel"), tf.Variable([1, 2])
    net.list = [tf.Variable(random(2), name="scale"), tf.Variable(random(2), name="scale")]
    checkpoint = tf.train.Checkpoint(net=net)
    checkpoint.save(str(out / "ckpt"))
    net.bare.assign([3, 4])
    checkpoint.save(str(out / "ckpt"))
    first, second = net.list
    return {
        "head/kernel": net.dense.numpy(),
        "net/bare": np.array([3, 4], "i4"),
        "net/list/0": first.numpy(),
        "net/list/1": second.numpy(),
        "save_counter": np.int64(2),
    }


def slots(out):
    """An optimizer of TensorFlow 1 in an object graph."""
    w = tf.Variable(random((2, 3)).astype("f4"), name="fc/kernel")
    b = tf.Variable(random(3).astype("f4"), name="fc/bias")
    optimizer = v1.train.AdamOptimizer(0.1)
    optimizer.minimize(lambda: tf.reduce_sum(w * w) + tf.reduce_sum(b * b))
    tf.train.Checkpoint(w=w, b=b, opt=optimizer).write(str(out / "m"))
    expected = {f"optimizer/.OPTIMIZER_SLOT/{v.name[:-2]}": v.numpy() for v in optimizer._get_beta_accumulators()}
    for variable, name in [(w, "fc/kernel"), (b, "fc/bias")]:
        expected[name] = variable.numpy()
        for slot in ("m", "v"):
            expected[f"{name}/.OPTIMIZER_SLOT/opt/{slot}"] = optimizer.get_slot(variable, slot).numpy()
    return expected


def functional():
    keras.backend.clear_session()
    image = keras.Input((8, 8, 3))
    layers = [keras.layers.Conv2D(4, 3, name="conv"), keras.layers.BatchNormalization(name="bn")]
    inner = keras.Sequential(layers, name="stem")
    features = keras.layers.GlobalAveragePooling2D()(inner(image))
    model = keras.Model(image, keras.layers.Dense(2, name="head")(features))
    return randomised(model)


def subclassed():
    """A model with two layers of one name, whose biases are equal as well."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.a, self.b = keras.layers.Dense(3, name="fc"), keras.layers.Dense(3, name="fc")

        def call(self, x):
            return self.b(self.a(x))

    model = Net()
    model(np.zeros((1, 3), "f4"))
    randomised(model)
    model.b.bias.assign(model.a.bias)
    return model


def randomised(model):
    for variable in model.variables:
        variable.assign(random(variable.shape).astype("f4"))
    return model


def values(model):
    return {variable.path: variable.numpy() for variable in model.variables}


def keras_plain(out):
    model = functional()
    tf.train.Checkpoint(model).write(str(out / "m"))
    return values(model)


def keras_trained(out):
    """A compiled model beside its optimizer, under whose attributes most of the model's variables are then kept."""
    model = functional()
    model.compile("adam", "mse")
    model.fit(random((2, 8, 8, 3)), random((2, 2)), verbose=0)
    tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(out / "m"))
    optimizer = {f"optimizer/.OPTIMIZER_SLOT/{v.path}": v.numpy() for v in model.optimizer.variables}
    return values(model) | optimizer


def keras_repeated(out):
    model = subclassed()
    tf.train.Checkpoint(model).write(str(out / "m"))
    a, b = model.a, model.b
    leaves = {"a/_kernel": a.kernel, "a/bias": a.bias, "b/_kernel": b.kernel, "b/bias": b.bias}
    return {name: variable.numpy() for name, variable in leaves.items()}


def saved_model(out):
    model = functional()
    model.export(str(out), verbose=False)
    return values(model)


def saved_model_repeated(out):
    model = subclassed()
    model.export(str(out), verbose=False)
    return {f"variables/{number}": variable.numpy() for number, variable in enumerate(model.variables)}


def saved_module(out):
    """Names of variables in lists, and a slash in an attribute's name."""
    net = tf.Module()
    net.blocks = [tf.Variable(random((2, 3)).astype("f4"), name=f"blocks_{number}/kernel") for number in range(2)]
    net.table = {"a/b.c": tf.Variable(random(3), name="table")}
    tf.saved_model.save(net, str(out))
    return {variable.name.removesuffix(":0"): variable.numpy() for variable in (*net.blocks, net.table["a/b.c"])}


def saved_module_bare(out):
    """The same with a bundle that has lost its object graph: the names are in saved_model.pb as well."""
    expected = saved_module(out)
    reader = tf.train.load_checkpoint(str(out / "variables" / "variables"))
    keys = [key for key in reader.get_variable_to_shape_map() if key != "_CHECKPOINTABLE_OBJECT_GRAPH"]
    values = [reader.get_tensor(key) for key in keys]
    for file in (out / "variables").iterdir():
        file.unlink()
    prefix = str(out / "variables" / "variables")
    tf.raw_ops.SaveV2(prefix=prefix, tensor_names=keys, shape_and_slices=[""] * len(keys), tensors=values)
    return expected


def saved_model_of_names(out):
    """A SavedModel of TensorFlow 1, whose variables are kept by their names."""
    with tf.Graph().as_default(), v1.Session() as session:
        image = v1.placeholder(tf.float32, (None, 3), "image")
        kernel = v1.get_variable("fc/kernel", (3, 2))
        split = v1.get_variable("split/kernel", (4, 2), partitioner=v1.fixed_size_partitioner(2))
        session.run(v1.global_variables_initializer())
        v1.saved_model.simple_save(session, str(out / "m"), {"image": image}, {"fc": image @ kernel})
        values = {"fc/kernel": session.run(kernel), "split/kernel": session.run(tf.convert_to_tensor(split))}
    for file in (out / "m").iterdir():
        file.rename(out / file.name)
    return values


FORMS = (
    saver,
    sharded,
    partitioned,
    first,
    first_sharded,
    quarters,
    dtypes,
    many,
    others,
    module,
    slots,
    keras_plain,
    keras_trained,
    keras_repeated,
    saved_model,
    saved_model_repeated,
    saved_module,
    saved_module_bare,
    saved_model_of_names,
)


def main(out, *wanted):
    expected = {}
    for form in FORMS:
        if wanted and form.__name__ not in wanted:
            continue
        folder = Path(out, form.__name__)
        folder.mkdir(parents=True)
        arrays = {name: np.asarray(value) for name, value in form(folder).items()}
        expected[form.__name__] = {n: [a.dtype.name, a.shape, a.tobytes().hex()] for n, a in sorted(arrays.items())}
    Path(out, "expected.json").write_text(json.dumps(expected))


if __name__ == "__main__":
    main(*sys.argv[1:])
