"""TensorFlow checkpoints, as `tf.compat.v1.train.Saver` and `tf.train.Checkpoint` write them.

`read` takes a bundle's prefix or any of its files, a table of the first format, a `checkpoint` file (which names the
latest of several in its folder), or a folder that holds one checkpoint or such a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint
from converters.readers import Contents
from converters.readers.protobuf import blame
from converters.readers.tensor_protos import TENSORFLOW
from converters.readers.tensorflow.bundle import Bundle, open_bundle
from converters.readers.tensorflow.object_graph import GRAPH_KEY, METRICS, Node, name_variables, parse_graph
from converters.readers.tensorflow.paths import find_tables, is_checkpoint, resolve
from converters.readers.tensorflow.tables import open_tables

__all__ = ["FORMAT", "accepts", "own_graph", "read", "read_bundle"]

FORMAT = "TensorFlow checkpoint"
STRING = 7  # TensorFlow's DataType
SEED = "/seed_generator_state"  # of Keras's dropout
MAX_GRAPH = 1 << 22  # bytes; a thousand layers take a million
MAX_TEXT = 1 << 20  # bytes of all string tensors that are kept

accepts = is_checkpoint


def read(path: Path) -> Contents:
    """Every variable under its own name, in one flat dict; see `read_bundle`."""
    path = resolve(path)
    if paths := find_tables(path):
        tables = open_tables(paths)
        writer = f"TensorFlow Saver, first format (producer version {tables.producer})"
        return Contents(dict(tables.tensors), tables.files, "CRC-32C of every block", writer)
    bundle = open_bundle(path)
    return read_bundle(bundle, own_graph(bundle))


def read_bundle(bundle: Bundle, graph: list[Node] | None) -> Contents:
    """A bundle's variables under the names that `graph` gives them, or under their keys.

    Optimizers' variables have `/.OPTIMIZER_SLOT/` in their names where there is an object graph. Small string tensors
    are plain text; types that hold no numbers are a sentence that says so.
    """
    tree: dict[str, Any] = {}
    set_aside: dict[str, str] = {}
    room = MAX_TEXT
    keys = [key for key in bundle.entries if key != GRAPH_KEY]
    names = dict(zip(keys, keys, strict=True))
    if graph is not None:
        with blame(bundle.index, GRAPH_KEY):
            names = name_variables(graph, {key: bundle.entries[key] for key in keys})
    for key, name in names.items():
        if name in tree:
            raise DamagedCheckpoint("is the name of two tensors", file=bundle.index.path, tensor=name)
        entry = bundle.entries[key]
        if graph is not None and key.startswith(METRICS):
            set_aside[f"{METRICS}**"] = "what metrics have counted"
        elif graph is not None and name.endswith(SEED):
            set_aside[f"**{SEED}"] = "random generator state"
        elif entry.dtype in TENSORFLOW.dtypes:
            tree[name] = bundle.tensor(key, name)
        elif entry.dtype == STRING and not entry.pieces and entry.size <= room:
            room -= entry.size
            texts = [str(text, "utf-8", "backslashreplace") for text in bundle.strings(key)]
            tree[name] = texts if entry.shape else texts[0]
        else:
            tree[name] = TENSORFLOW.refusal(entry.dtype)
    return Contents(
        tree=tree,
        files=(bundle.index, *bundle.shards.values()),
        integrity="CRC-32C of every tensor",
        writer=f"TensorFlow bundle (producer version {bundle.producer})",
        set_aside=set_aside,
    )


def own_graph(bundle: Bundle) -> list[Node] | None:
    """The bundle's own object graph."""
    entry = bundle.entries.get(GRAPH_KEY)
    if entry is None:
        return None
    file = bundle.index.path
    if entry.size > MAX_GRAPH:
        raise UnsafeCheckpoint(f"an object graph of {entry.size} bytes is beyond reason", file=file, tensor=GRAPH_KEY)
    if (entry.dtype, entry.shape, entry.pieces) != (STRING, (), ()):
        raise DamagedCheckpoint("is not one string", file=file, tensor=GRAPH_KEY)
    with blame(bundle.index, GRAPH_KEY):
        return parse_graph(bundle.strings(GRAPH_KEY)[0])
