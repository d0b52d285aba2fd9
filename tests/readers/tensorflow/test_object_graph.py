"""Variables go by the names that the graph gives them, as far as these tell them apart."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from converters.readers.tensorflow.bundle import Entry
from converters.readers.tensorflow.object_graph import name_variables, parse_graph

write = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("bundle_writer.py"))))
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"


def node(full_name: str = "", key: str = "", slots: bool = False, **children: int) -> bytes:
    """A node of a graph, with a variable if it has a key."""
    parts = [(1, write.message((1, number), (2, name.encode()))) for name, number in children.items()]
    if key:
        parts.append((2, write.message((1, b"VARIABLE_VALUE"), (2, full_name.encode()), (3, (key + VALUE).encode()))))
    return write.message(*parts, *([(3, write.message((2, b"m")))] if slots else []))


CASES: dict[str, tuple[list[bytes], dict[str, str]]] = {
    "full names": ([node("fc/kernel", "a/w"), node("fc/bias", "a/b")], {"a/w": "fc/kernel", "a/b": "fc/bias"}),
    "a name twice": ([node("fc", "a"), node("fc", "b"), node("head", "c")], {"a": "a", "b": "b", "c": "head"}),
    "no name": ([node("", "a"), node("Variable", "b"), node("x/Variable_3", "c")], {"a": "a", "b": "b", "c": "c"}),
    "no node": ([], {"a": "a"}),
    "a name that is another's key": ([node("b", "a"), node("x", "c"), node("x", "b")], {"a": "a", "b": "b", "c": "c"}),
    "metrics": (
        [node("total", "keras_api/metrics/0/total")],
        {"keras_api/metrics/0/total": "keras_api/metrics/0/total"},
    ),
    "slots": (
        [
            node("fc", "a"),
            node("fc/Adam", "a/.OPTIMIZER_SLOT/opt/m"),
            node("beta1_power", "opt/b"),
            node(slots=True, b=2),
        ],
        {
            "a": "fc",
            "a/.OPTIMIZER_SLOT/opt/m": "fc/.OPTIMIZER_SLOT/opt/m",
            "opt/b": "optimizer/.OPTIMIZER_SLOT/beta1_power",
        },
    ),
    "an optimizer without slots": (
        [node(iter=1, learning_rate=2), node("SGD/iter", "o/i"), node("SGD/lr", "o/l")],
        {"o/i": "optimizer/.OPTIMIZER_SLOT/SGD/iter", "o/l": "optimizer/.OPTIMIZER_SLOT/SGD/lr"},
    ),
    "an optimizer that lists the model's": (
        [
            node(_iterations=1, _variables=2, _trainable_variables=3),
            node("adam/iteration", "o/_iterations"),
            node(**{"0": 1, "1": 4}),
            node(**{"0": 5}),
            node("adam/fc_momentum", "o/_variables/1"),
            node("fc", "o/_trainable_variables/0"),
        ],
        {
            "o/_iterations": "optimizer/.OPTIMIZER_SLOT/adam/iteration",
            "o/_variables/1": "optimizer/.OPTIMIZER_SLOT/adam/fc_momentum",
            "o/_trainable_variables/0": "fc",
        },
    ),
    "second copies": (
        [node("fc", "variables/0"), node("fc", "_all_variables/7")],
        {"variables/0": "fc", "_all_variables/7": None},
    ),
    "no second copies": (
        [node("fc", "variables/0"), node("fc", "_all_variables/7, another value")],
        {"variables/0": "variables/0", "_all_variables/7, another value": "_all_variables/7, another value"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_names(case: str) -> None:
    nodes, expected = CASES[case]
    entries = {key + VALUE: Entry(1, (), 0, 0, 4, crc=len(key) if "another" in key else 0) for key in expected}
    graph = parse_graph(memoryview(write.message(*((1, one) for one in nodes))))
    found: dict[str, Any] = name_variables(graph, entries)
    assert found == {key + VALUE: name for key, name in expected.items() if name}


def test_a_key_without_the_ending_stays_apart_from_one_with_it() -> None:
    entries = {key: Entry(1, (), 0, 0, 4, 0) for key in ("a", "a" + VALUE)}
    assert name_variables([], entries) == {"a": "a", "a" + VALUE: "a" + VALUE}
