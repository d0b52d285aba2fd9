"""Frozen graphs as TensorFlow's own tools make them, and the weights that they hold.

    python tensorflow_graphs.py OUT

writes `OUT/FORM.pb` (or a SavedModel `OUT/FORM`) and `OUT/expected.json`: FORM -> name -> [dtype, shape, bytes in hex],
which are what the variables held. Tests run this in a child process, because TensorFlow cannot share one with triton.
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
    from tensorflow.core.framework import graph_pb2, tensor_pb2, types_pb2
    from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

    v1 = tf.compat.v1

random = np.random.default_rng(0).standard_normal
SPLIT = {"rows/kernel": 0, "columns/kernel": 1, "last/kernel": -1}  # name: the axis it is split along


def net(out, resource):
    """A net of TensorFlow 1 with partitioned variables, frozen; its graph and its variables' values."""
    (v1.enable_resource_variables if resource else v1.disable_resource_variables)()
    with tf.Graph().as_default(), v1.Session() as session:
        x = v1.placeholder(tf.float32, (None, 8, 8, 3), "image")
        names = {
            "conv/kernel": v1.get_variable("conv/kernel", (3, 3, 3, 4)),
            "half/bias": v1.get_variable("half/bias", (4,), tf.float16),
            "ones/gamma": v1.get_variable("ones/gamma", (300,), initializer=v1.ones_initializer()),
            "alpha": v1.get_variable("alpha", ()),
        }
        for name, axis in SPLIT.items():
            split = v1.fixed_size_partitioner(3, axis=axis % 2)
            names[name] = tf.convert_to_tensor(v1.get_variable(name, (4, 5), partitioner=split))
        x = tf.nn.conv2d(x, names["conv/kernel"], 1, "SAME") + tf.cast(names["half/bias"], tf.float32)
        x = tf.reduce_mean(x, [1, 2]) * names["alpha"] + tf.reduce_sum(names["ones/gamma"]) + 0.25
        tf.identity(tf.add_n([x @ names[name] for name in SPLIT]), "out")
        session.run(v1.global_variables_initializer())
        values = {name: session.run(variable) for name, variable in names.items()}
        return v1.graph_util.convert_variables_to_constants(session, session.graph_def, ["out"]), values


def write(graph, out):
    Path(f"{out}.pb").write_bytes(graph.SerializeToString())


def of_references(out):
    graph, values = net(out, resource=False)
    write(graph, out)
    return values


def of_resources(out):
    graph, values = net(out, resource=True)
    write(graph, out)
    return values


def without_identities(out):
    """As `of_resources`, with less to tell a variable by: no scalar is taken for one then."""
    graph, values = net(out, resource=True)
    write(v1.graph_util.remove_training_nodes(graph), out)
    return {name: value for name, value in values.items() if name != "alpha"}


def of_tensorflow_2(out):
    image = keras.Input((8, 8, 3))
    layers = [keras.layers.Conv2D(4, 3, name="conv"), keras.layers.BatchNormalization(name="bn")]
    model = keras.Sequential([image, *layers, keras.layers.Dense(3, name="head")])
    for variable in model.variables:
        variable.assign(random(variable.shape).astype("f4"))
    call = tf.function(lambda x: model(x, training=False))
    frozen = convert_variables_to_constants_v2(call.get_concrete_function(tf.TensorSpec((1, 8, 8, 3))))
    write(frozen.graph.as_graph_def(), out)
    gamma, beta, mean, variance = layers[1].variables
    values = {"Cast": mean, "Cast_1": variance, "Cast_2": gamma, "Cast_3": beta}
    found = {f"bn_1/{reader}": value for reader, value in values.items()}
    found |= {"conv_1/convolution": layers[0].kernel, "conv_1/Reshape": layers[0].bias}
    found |= {"head_1/Cast": model.layers[-1].kernel, "head_1/BiasAdd": model.layers[-1].bias}
    return {f"sequential_1/{name}/ReadVariableOp/resource": value.numpy() for name, value in found.items()}


def of_every_field(out):
    """Numbers in each field that a TensorProto has for them, some left to be repeated."""
    graph, expected = graph_pb2.GraphDef(), {}
    halves = np.array([1.5, -2.25, 3], "f2").view("u2").tolist()
    fields = {
        "float_val": ("DT_FLOAT", [1.5, -2.25, 3.0]),
        "double_val": ("DT_DOUBLE", [0.1, -1e300, 3.0]),
        "half_val": ("DT_HALF", halves),
        "bfloat16": ("DT_BFLOAT16", [0x3F80, 0xC000, 0x4049]),
    }
    for name, (dtype, values) in fields.items():
        field = "half_val" if name == "bfloat16" else name
        for count in (0, 1, 2, 3):
            proto = tensor_pb2.TensorProto(dtype=types_pb2.DataType.Value(dtype), **{field: values[:count]})
            proto.tensor_shape.dim.add().size = 3
            node = graph.node.add(name=f"{name}/of_{count}", op="Const")
            node.attr["value"].tensor.CopyFrom(proto)
            zeros = np.zeros(3, tf.as_dtype(proto.dtype).as_numpy_dtype)
            expected[node.name] = tf.make_ndarray(proto) if count else zeros
    write(graph, out)
    return expected


def saved_model(out):
    """A SavedModel that holds a frozen graph and no variables."""
    graph, values = net(out, resource=True)
    with tf.Graph().as_default(), v1.Session() as session:
        image, logits = tf.import_graph_def(graph, return_elements=["image:0", "out:0"], name="")
        v1.saved_model.simple_save(session, str(out), {"image": image}, {"out": logits})
    return values


FORMS = (of_references, of_resources, without_identities, of_tensorflow_2, of_every_field, saved_model)

if __name__ == "__main__":
    expected = {}
    for form in FORMS:
        arrays = {name: np.asarray(value) for name, value in form(Path(sys.argv[1], form.__name__)).items()}
        expected[form.__name__] = {n: [a.dtype.name, a.shape, a.tobytes().hex()] for n, a in sorted(arrays.items())}
    Path(sys.argv[1], "expected.json").write_text(json.dumps(expected))
