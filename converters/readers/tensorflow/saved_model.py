"""SavedModels: a folder of a graph, `saved_model.pb`, and of its variables, a bundle called `variables/variables`.

    saved_model.pb:  2 meta graph: 1 info (5 TensorFlow's version) | 2 graph | 7 objects: 1 object
    object:          1 child (1 object's number, 2 name) | 7 variable (6 name)

The graph (tensorflow/core/protobuf/meta_graph.proto, saved_object_graph.proto) is not run. It is asked for variables'
names where the bundle has no object graph, and for constants where there are no variables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from converters.errors import CheckpointError
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.protobuf import Message, Span, blame
from converters.readers.tensorflow.bundle import open_bundle
from converters.readers.tensorflow.checkpoint import own_graph, read_bundle
from converters.readers.tensorflow.graph_def import read_constants
from converters.readers.tensorflow.object_graph import VALUE, Node
from converters.tensors import LazyTensor

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "TensorFlow SavedModel"
GRAPH, VARIABLES = "saved_model.pb", "variables/variables"
ESCAPED = re.compile(r"\.(.)")  # in a key: `..` a point, `.S` a slash


def accepts(path: Path, head: bytes) -> bool:
    """Whether this is such a folder, or the graph in it."""
    folder = path if path.is_dir() else path.parent
    if path != folder and path.name != GRAPH:
        return False
    return (folder / GRAPH).is_file() or (folder / f"{VARIABLES}.index").is_file()


def read(path: Path) -> Contents:
    """The variables under their own names, or else the weights among the graph's constants."""
    folder = path if path.is_dir() else path.parent
    graphs, source = [], None
    if (folder / GRAPH).is_file():
        source = SourceFile(folder / GRAPH)
        with blame(source):
            graphs = list(Message(Span.whole(source)).messages(2))
    contents = _read_variables(folder, graphs, source) if (folder / f"{VARIABLES}.index").is_file() else None
    if contents is None or not any(isinstance(leaf, LazyTensor) for leaf in contents.tree.values()):
        contents = _read_graph(folder, graphs, source)
    if source is None:
        return contents
    with blame(source):
        version = next((text for graph in graphs if (text := graph.message(1).text(5))), None)
    writer = f"TensorFlow {version}" if version else contents.writer
    return replace(contents, files=(source, *contents.files), writer=writer)


def _read_variables(folder: Path, graphs: list[Message], source: SourceFile | None) -> Contents:
    bundle = open_bundle(folder / VARIABLES)
    nodes = own_graph(bundle)
    if nodes is None and source is not None and any(key.endswith(VALUE) for key in bundle.entries):
        with blame(source):
            nodes = list(_named(graphs, bundle.entries))
    return read_bundle(bundle, nodes)


def _named(graphs: list[Message], keys: Iterable[str]) -> Iterator[Node]:
    """The variables that the first graph's objects know the names of; a key is the path of children to one."""
    objects = list(graphs[0].message(7).messages(1)) if graphs else []
    children = [{child.text(2): child.integer(1) for child in one.messages(1)} for one in objects]
    for key in keys:
        number = 0
        for step in key.removesuffix(VALUE).split("/"):
            name = ESCAPED.sub(lambda found: "/" if found[1] == "S" else found[1], step)
            number = children[number].get(name, -1) if 0 <= number < len(objects) else -1
        if 0 <= number < len(objects):
            yield Node({}, {key: objects[number].message(7).text(6)}, False)


def _read_graph(folder: Path, graphs: list[Message], source: SourceFile | None) -> Contents:
    """The weights among the constants of the first graph."""
    parts = graphs[0].parts(2) if graphs else []
    if source is None or not parts or not isinstance(parts[-1], Span):
        raise CheckpointError("is a SavedModel without variables", file=folder, cure="is the download complete?")
    tree, set_aside = read_constants(parts[-1])
    return Contents(tree, (), "none in format", set_aside=set_aside)
