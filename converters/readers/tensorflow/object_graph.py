"""The object graph of a TensorFlow 2 checkpoint: what its variables were called in the program.

`tf.train.Checkpoint` stores a variable under the path of Python attributes that leads to it
(`_operations/3/_kernel/.ATTRIBUTES/VARIABLE_VALUE`), which changes with every way of saving, and beside all of them
a TrackableObjectGraph (tensorflow/core/protobuf/trackable_object_graph.proto) that knows their own names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from converters.readers.protobuf import Malformed, Message
from converters.readers.tensorflow.bundle import Entry

__all__ = ["GRAPH_KEY", "METRICS", "OPTIMIZER", "VALUE", "Node", "name_variables", "parse_graph"]

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
OPTIMIZER = "/.OPTIMIZER_SLOT/"  # stands in the names of what an optimizer keeps, and in no others
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
MIRROR = "_all_variables/"  # Keras's export lists every variable a second time here, in no order
METRICS = "keras_api/"  # what a metric counts is called "total" and "count", whatever it measures
UNNAMED = re.compile(r"(.*/)?Variable(_\d+)?")  # TensorFlow's name for a variable that nobody named
OPTIMIZER_CHILDREN = ({"_iterations", "_variables"}, {"iter", "learning_rate"})  # Keras since 2.11, and before


@dataclass(frozen=True, slots=True)
class Node:
    """A Python object that was saved."""

    children: dict[str, int]
    variables: dict[str, str]  # checkpoint key: full name
    is_optimizer: bool


def parse_graph(graph: memoryview) -> list[Node]:
    """The nodes of a TrackableObjectGraph. Raises Malformed."""
    return [_node(message) for message in Message(graph).messages(1)]


def name_variables(nodes: list[Node], entries: Mapping[str, Entry]) -> dict[str, str]:
    """Key -> name for all of `entries` but the second copies that an exported model holds.

    A variable goes by its full name; where several share one, or it has none, by its key without VALUE.
    An optimizer's slots are called `VARIABLE/.OPTIMIZER_SLOT/OPTIMIZER/SLOT`, and whatever else it keeps
    `optimizer/.OPTIMIZER_SLOT/FULL_NAME`. Raises Malformed where the graph is damaged.
    """
    kept_by_optimizers = set(_kept_by_optimizers(nodes))
    full_names = {key: name for node in nodes for key, name in node.variables.items()}
    mirrored = set(_mirrored(entries, full_names))
    keys = [key for key in entries if key not in mirrored]

    paths = {key: path if (path := key.removesuffix(VALUE)) not in entries else key for key in keys}
    wishes = {}
    for key in keys:
        name = full_names.get(key, "")
        if name and not UNNAMED.fullmatch(name) and not key.startswith(METRICS) and OPTIMIZER not in key:
            wishes[key] = f"optimizer{OPTIMIZER}{name}" if key in kept_by_optimizers else name
    wanted = Counter([*wishes.values(), *paths.values()])
    names = dict(paths)
    for key, name in wishes.items():
        if wanted[name] == 1 + (name == paths[key]):
            names[key] = name
    for key in keys:
        variable, is_slot, slot = paths[key].partition(OPTIMIZER)
        if is_slot:
            names[key] = names.get(variable + VALUE, variable) + OPTIMIZER + slot
    return names


def _node(message: Message) -> Node:
    children = {child.text(2): child.integer(1) for child in message.messages(1)}
    variables = {attribute.text(3): attribute.text(2) for attribute in message.messages(2)}
    return Node(children, variables, 3 in message or any(kind <= children.keys() for kind in OPTIMIZER_CHILDREN))


def _kept_by_optimizers(nodes: list[Node]) -> Iterator[str]:
    """Keys of the variables that lie directly in an optimizer or in its list of its own."""
    for node in nodes:
        if node.is_optimizer:
            own = _child(nodes, node.children["_variables"]) if "_variables" in node.children else node
            for child in (*node.children.values(), *own.children.values()):
                yield from _child(nodes, child).variables


def _child(nodes: list[Node], number: int) -> Node:
    if number not in range(len(nodes)):
        raise Malformed(f"the object graph has no node {number}")
    return nodes[number]


def _mirrored(entries: Mapping[str, Entry], full_names: Mapping[str, str]) -> Iterator[str]:
    """Keys under MIRROR whose full name, type, shape and checksums stand under another key as well."""
    twins: dict[object, list[str]] = {}
    for key, name in full_names.items():
        if name and key in entries:
            entry = entries[key]
            crcs = tuple(piece.crc for _, piece in entry.pieces)
            twins.setdefault((name, entry.dtype, entry.shape, entry.crc, crcs), []).append(key)
    for keys in twins.values():
        copies = [key for key in keys if key.startswith(MIRROR)]
        if len(copies) < len(keys):
            yield from copies
