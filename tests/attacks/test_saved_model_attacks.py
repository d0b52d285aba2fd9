"""Hostile and damaged SavedModels, each in a watched child: their graphs are not run, nor do they cost much."""

from __future__ import annotations

import runpy
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from converters.errors import CheckpointError
from converters.readers import open_checkpoint

write = SimpleNamespace(
    **runpy.run_path(str(Path(__file__).parents[1] / "readers" / "tensorflow" / "bundle_writer.py"))
)
message = write.message

SIX = struct.pack("<6f", *range(6))
VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
WITH_FILES = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf
net, canary = tf.Module(), os.path.join(sys.argv[1], "canary")
net.w = tf.Variable([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], name="fc/kernel")
with tf.init_scope():
    asset = os.path.join(os.path.dirname(sys.argv[1]), "asset")
    open(asset, "w").write("text")
net.asset = tf.saved_model.Asset(asset)

@tf.function(input_signature=[])
def call():
    tf.io.write_file(canary, tf.io.read_file("/etc/passwd"))
    return net.w + tf.strings.to_number(tf.io.read_file(net.asset))

net.call = call
tf.saved_model.save(net, sys.argv[1])
"""


def with_files(folder: Path) -> None:
    """A model that reads and writes files wherever it is run, written by TensorFlow."""
    helper = folder.with_name("helper")
    helper.mkdir()
    subprocess.run([sys.executable, "-c", WITH_FILES, helper / "m"], check=True, capture_output=True, timeout=120)
    (helper / "m").rename(folder)
    (helper / "asset").unlink()
    helper.rmdir()


def objects(*nodes: bytes) -> bytes:
    return message((1, 1), (2, message((1, message((5, b"2.21.0"))), (7, message(*((1, node) for node in nodes))))))


def child(number: int, name: str) -> tuple[int, bytes]:
    return 1, message((1, number), (2, name.encode()))


def variable(name: str) -> bytes:
    return message((7, message((6, name.encode()))))


def saved(folder: Path, graph: bytes | None, *keys: str) -> None:
    """A SavedModel of this graph, with a bundle of the same six numbers under every key."""
    folder.mkdir()
    if graph is not None:
        (folder / "saved_model.pb").write_bytes(graph)
    if keys:
        (folder / "variables").mkdir()
        rows = {key.encode(): write.entry(SIX, (2, 3), offset=24 * number) for number, key in enumerate(keys)}
        write.bundle(folder / "variables" / "variables", {b"": write.header(), **rows}, SIX * len(keys))


KEY = f"a/a/w{VALUE}"
LOOP = objects(message(child(0, "a"), child(1, "w")), variable("fc"))
ABSENT = objects(message(child(9, "a"), child(-1, "w")))
OPENED: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "ops on files": (with_files, ["fc/kernel"]),
    "an object within itself": (lambda folder: saved(folder, LOOP, KEY), ["fc"]),
    "an absent object": (lambda folder: saved(folder, ABSENT, KEY), ["a/a/w"]),
    "no objects": (lambda folder: saved(folder, objects(), KEY), ["a/a/w"]),
    "no graph": (lambda folder: saved(folder, None, KEY), [KEY]),
}
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "cut off": (lambda folder: saved(folder, LOOP[:-3], "w"), "saved_model.pb: field 2 has"),
    "no message": (lambda folder: saved(folder, b"\x0b", "w"), "saved_model.pb: field 1 has the wire type 3"),
    "a name of no text": (
        lambda folder: saved(folder, objects(message(child(1, "w")), message((7, message((6, b"\xff"))))), f"w{VALUE}"),
        "saved_model.pb: field 6 is not UTF-8",
    ),
    "neither variables nor constants": (lambda folder: saved(folder, objects()), "is a SavedModel without variables"),
    "an empty file": (lambda folder: saved(folder, b""), "is a SavedModel without variables"),
    "graphs": (lambda folder: saved(folder, b"\x12\x00" * (1 << 19), "w"), "a message has more than 262144 fields"),
    "objects": (
        lambda folder: saved(folder, objects(*[b""] * (1 << 19)), f"w{VALUE}"),
        "a message has more than 262144 fields",
    ),
}


@pytest.fixture(scope="module")
def outcomes(watch: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return watch({name: make for name, (make, _) in [*OPENED.items(), *REFUSED.items()]})


@pytest.mark.parametrize("name", OPENED)
def test_variables_are_read_whatever_the_graph_says(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    assert outcomes[name] == {"tensors": dict.fromkeys(OPENED[name][1], SIX.hex()), "broken": []}


def test_a_flip_or_a_cut_of_the_graph_moves_no_variable(spoil: Callable[..., Any], tmp_path: Path) -> None:
    """It has no checksum, and may tell another name."""
    graph = objects(message(child(0, "a"), child(1, "w")), variable("fc"))
    saved(tmp_path / "m", graph, KEY)
    for _, data in spoil(graph):
        (tmp_path / "m" / "saved_model.pb").write_bytes(data)
        try:
            assert [tensor.read() for tensor in open_checkpoint(tmp_path / "m").tensors.values()] == [SIX]
        except CheckpointError as error:
            assert str(error).startswith(str(tmp_path)) and str(error).isprintable()


@pytest.mark.parametrize("name", REFUSED)
def test_an_attack_is_refused_in_one_line(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    outcome = outcomes[name]
    assert outcome["broken"] == []
    assert REFUSED[name][1] in outcome.get("refusal", outcome)
    assert outcome["refusal"].isprintable() and len(outcome["refusal"]) < 1000
