"""Every form of checkpoint that JAX's libraries write, and the arrays that went into it.

    python forms.py OUT

writes `OUT/FORM` and `OUT/expected.json`: FORM -> name -> [dtype, shape, bytes in hex]. Tests run this in a child
process, so that none of them imports JAX.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

if __name__ == "__main__":  # pytest imports this module to look for doctests
    os.environ["JAX_PLATFORMS"] = "cpu"
    import flax.linen as nn
    import flax.serialization
    import jax
    import jax.numpy as jnp
    import optax
    import orbax.checkpoint as ocp
    from flax import nnx, traverse_util
    from flax.training.train_state import TrainState

random = np.random.default_rng(0).standard_normal


def flat(tree):
    return {"/".join(map(str, path)): value for path, value in traverse_util.flatten_dict(tree).items()}


def variables():
    """A net's variables, and their values by their modules' names."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=True, name="bn")(nn.Conv(4, (3, 3), name="conv")(x))
            return nn.Dense(2, name="head")(x.mean((1, 2)))

    tree = jax.tree.map(
        lambda leaf: random(leaf.shape).astype("f4"), Net().init(jax.random.key(0), jnp.ones((1, 8, 8, 3)))
    )
    return tree, flat(tree["params"]) | flat(tree["batch_stats"])


def dtypes():
    names = "bfloat16 float16 float32 float64 int8 int16 int32 int64 uint8 uint16 uint32 uint64 bool complex64"
    arrays = {name: np.asarray(9 * random((3, 5)), jnp.dtype(name)) for name in names.split()}
    return arrays | {"scalar": np.asarray(1.5), "empty": np.zeros((0, 3), "f4")}


def training_state(tree):
    state = TrainState.create(apply_fn=None, params=tree["params"], tx=optax.adam(1e-3))
    return {**flax.serialization.to_state_dict(state), "batch_stats": tree["batch_stats"]}


def msgpack(out):
    tree, expected = variables()
    out.write_bytes(flax.serialization.to_bytes(tree))
    return expected


def msgpack_training(out):
    tree, expected = variables()
    out.write_bytes(flax.serialization.to_bytes(training_state(tree)))
    return expected


def msgpack_dtypes(out):
    eights = {name: np.asarray([1, 2], jnp.dtype(name)) for name in ("float8_e4m3fn", "float8_e5m2")}
    arrays = {
        **dtypes(),
        "of 8 bits": eights,
        "numpy": np.float32(2.5),
        "list": {"0": np.ones(2), "1": np.ones(3, "f4")},
    }
    others = {"text": "hi", "none": None, "no": False, "float": 0.5, "complex": 1 + 2j, "empty dict": {}}
    numbers = {"large": 1 << 40, "negative": [-3, -300, -70_000, -(1 << 40)]}
    lists = {"list": list(arrays["list"].values())}
    out.write_bytes(flax.serialization.to_bytes({**arrays, **lists, **others, **numbers}))
    return flat(arrays)


def msgpack_chunked(out):
    """As arrays of more than a gigabyte are stored, in chunks of 64 bytes."""
    flax.serialization.MAX_CHUNK_SIZE = 64
    tree = {
        "params": {
            "a": random((10, 10)).astype("f4"),
            "b": random((3, 3)),
            "c": np.asarray(random((7, 9)), jnp.bfloat16),
        }
    }
    out.write_bytes(flax.serialization.to_bytes(tree))
    return tree["params"]


def npz(out):
    """As vision_transformer publishes weights."""
    _, expected = variables()
    np.savez(out.open("wb"), **expected)
    return expected


def npz_deflated(out):
    _, expected = variables()
    np.savez_compressed(out.open("wb"), **{f"params/{name}": value for name, value in expected.items()})
    return expected


def npz_training(out):
    """As vision_transformer saves what it fine-tunes."""
    _, expected = variables()
    held = {f"opt/target/{name}": value for name, value in expected.items()}
    held |= {f"opt/state/param_states/{name}/m": value for name, value in expected.items()} | {
        "opt/state/step": np.int32(3)
    }
    np.savez(out.open("wb"), **held)
    return expected


def npz_dtypes(out):
    tree = dtypes()
    orders = {"fortran": np.asfortranarray(random((3, 4, 5))), "big": random((2, 3)).astype(">f4")}
    orders["both"] = np.asfortranarray(random((4, 3)) + 1j).astype(">c8")
    np.savez(out.open("wb"), **tree, **orders)
    return tree | {name: value.astype(value.dtype.newbyteorder("<")) for name, value in orders.items()}


def save(out, tree, **options):
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
        checkpointer.save(out.absolute(), tree)


def orbax(out):
    tree, expected = variables()
    save(out, training_state(tree))
    return expected


def orbax_folders(out):
    """Without a database: zarr arrays in folders of their own."""
    tree, expected = variables()
    save(out, tree, use_ocdbt=False)
    return expected


def orbax_zarr3(out):
    tree, expected = variables()
    save(out, tree, use_ocdbt=True, use_zarr3=True)
    return expected


def orbax_manager(out):
    tree, expected = variables()
    with ocp.CheckpointManager(out.absolute()) as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    return expected


def orbax_dtypes(out):
    tree = {name: value for name, value in dtypes().items() if name not in ("empty", "complex64")}
    tree["large"], tree["a/~/b"] = random((40, 40)).astype("f4"), {"w.x": random(3)}
    save(out, {**tree, "text": "hi", "number": 3, "nothing": {}})
    return flat(tree) | {"number": np.int64(3)}


def orbax_nnx(out):
    """A state of flax.nnx, with a random generator's."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.fc, self.bn = nnx.Linear(2, 3, rngs=rngs), nnx.BatchNorm(3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

    state = nnx.state(Net(nnx.Rngs(0)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(out.absolute(), state)
    return {name: value for name, value in flat(nnx.to_pure_dict(state)).items() if not name.startswith("drop")}


FORMS = (
    *(msgpack, msgpack_training, msgpack_dtypes, msgpack_chunked),
    *(npz, npz_deflated, npz_training, npz_dtypes),
    *(orbax, orbax_folders, orbax_zarr3, orbax_manager, orbax_dtypes, orbax_nnx),
)

if __name__ == "__main__":
    folder, expected = Path(sys.argv[1]), {}
    for form in FORMS:
        arrays = {name: np.asarray(value) for name, value in form(folder / form.__name__).items()}
        expected[form.__name__] = {n: [a.dtype.name, a.shape, a.tobytes().hex()] for n, a in sorted(arrays.items())}
    (folder / "expected.json").write_text(json.dumps(expected))
