"""Damaged and hostile folders in Orbax's layout."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from converters.errors import CheckpointError
from converters.readers import open_checkpoint

SIX = struct.pack("<6f", *range(6))


def opened(path: Path) -> dict[str, Any]:
    return {name: (tensor.spec, bytes(tensor.read())) for name, tensor in open_checkpoint(path).tensors.items()}


def store(folder: Path, *keys: list[str], **options: Any) -> Path:
    """A folder as Orbax lays it out, of six numbers in a database under each of `keys`."""
    import tensorstore

    base = {"driver": "file", "path": f"{folder}/"}
    entries = {}
    for number, names in enumerate(keys or (["w"],)):
        config = {"max_inline_value_bytes": 0, "compression": None}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(names)}/", "config": config}
        spec = {"driver": "zarr", "kvstore": kvstore, "metadata": {"dtype": "<f4", "shape": [2, 3], "chunks": [1, 3]}}
        spec["metadata"] |= {"compressor": None, **options}
        array = tensorstore.open(spec, create=True, open=True).result()
        if "shape" not in options:
            array.write(np.frombuffer(SIX, "<f4").reshape(2, 3)).result()
        entries[str(number)] = entry(*names)
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": entries, "use_zarr3": False}))
    return folder


def entry(*keys: str) -> dict[str, Any]:
    key_metadata = [{"key": key, "key_type": 2} for key in keys]
    return {"key_metadata": key_metadata, "value_metadata": {"value_type": "jax.Array", "skip_deserialize": False}}


def relisted(folder: Path, *keys: list[str]) -> Path:
    entries = {str(number): entry(*names) for number, names in enumerate(keys)}
    (folder / "_METADATA").write_text(json.dumps({"tree_metadata": entries}))
    return folder


def test_a_damaged_database_gives_the_same_or_nothing(tmp_path: Path) -> None:
    """But for the numbers themselves, which it keeps without a checksum when they are many, as here."""
    folder = store(tmp_path / "o")
    before = opened(folder)
    assert before["w"][1] == SIX
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        intact = path.read_bytes()
        for at in range(0, len(intact), 3):
            for damaged in (intact[:at], intact[:at] + bytes([intact[at] ^ 1 << at % 8]) + intact[at + 1 :]):
                path.write_bytes(damaged)
                try:
                    found = opened(folder)
                    assert found == before or path.parent.name == "d"
                except CheckpointError as error:
                    assert str(error).startswith(str(folder)) and str(error).isprintable()
        path.write_bytes(intact)


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "d" / "pipe")
    return folder


def link(folder: Path) -> Path:
    (folder / "d" / "link").symlink_to("/etc/passwd")
    return folder


def emptied(folder: Path) -> Path:
    for path in (folder / "d").iterdir():
        path.unlink()
    return folder


def moved(folder: Path) -> Path:
    """Its manifest says that its nodes lie above the folder."""
    manifest = folder / "manifest.ocdbt"
    data = manifest.read_bytes()[:-4]
    name = next(path.name for path in (folder / "d").iterdir() if b"d/" + path.name.encode() in data)
    above = b"../" + b"x" * (len(name) - 1)
    shutil.move(folder / "d" / name, folder / above.decode())
    data = data.replace(b"d/" + name.encode(), above)
    manifest.write_bytes(data + struct.pack("<I", google_crc32c.value(data)))
    return folder


def marked(folder: Path) -> Path:
    folder.mkdir()
    (folder / "_CHECKPOINT_METADATA").write_text("{}")
    return folder


def unlisted(folder: Path) -> Path:
    (folder / "_METADATA").unlink()
    return folder


def rewritten(folder: Path, text: str) -> Path:
    (folder / "_METADATA").write_text(text)
    return folder


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pipe": (lambda path: pipe(store(path)), "pipe: is not a regular file"),
    "a link": (lambda path: link(store(path)), "link: is a link that leaves the folder"),
    "data above the folder": (lambda path: moved(store(path)), "w: tensorstore refuses it"),
    "no data": (lambda path: emptied(store(path)), "w: tensorstore refuses it"),
    "no such array": (lambda path: relisted(store(path), ["v"]), "v: tensorstore refuses it"),
    "terabytes": (
        lambda path: store(path, shape=[1 << 40], chunks=[1]),
        "w: its shape (1099511627776,), in chunks of (1,)",
    ),
    "chunks of terabytes": (
        lambda path: store(path, shape=[1], chunks=[1 << 40]),
        "in chunks of (1099511627776,), takes more",
    ),
    "nothing written": (lambda path: store(path, shape=[4], chunks=[4]), "w: tensorstore refuses it"),
    "keys that leave": (
        lambda path: relisted(store(path), ["../../etc"]),
        "../../etc: its keys would leave the folder",
    ),
    "an empty key": (lambda path: relisted(store(path), [""]), "its keys would leave the folder"),
    "one name by two ways": (lambda path: relisted(store(path), ["a", "b"], ["a/b"]), "a/b: is the name of two arrays"),
    "terminal codes": (lambda path: relisted(store(path), ["\x1b[2J"]), ": \\x1b[2J: tensorstore refuses it"),
    "nothing but a mark": (marked, "without _METADATA and without arrays; fetch the whole folder"),
    "paths that leave": (lambda path: unlisted(store(path, ["../w"])), "../w: its keys would leave the folder"),
    "no data, unlisted": (lambda path: unlisted(emptied(store(path))), "o: tensorstore refuses it"),
    "no JSON": (lambda path: rewritten(store(path), "{"), "it is not valid JSON with distinct names"),
    "brackets": (lambda path: rewritten(store(path), '{"tree_metadata":' + "[" * 100_000), "it is nested too deeply"),
    "no list": (lambda path: rewritten(store(path), '{"tree_metadata": 3}'), "lists no arrays, or too many"),
    "no keys": (lambda path: rewritten(store(path), '{"tree_metadata": {"w": {}}}'), "tree_metadata makes no sense"),
    "keys that are numbers": (lambda path: rewritten(store(path), '{"tree_metadata": {"w": 3}}'), "makes no sense"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_folder_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, words = FOLDERS[name]
    folder = make(tmp_path / "o")
    with pytest.raises(CheckpointError) as caught:
        opened(folder)
    assert words in str(caught.value)
    assert str(caught.value).startswith(str(folder)) and str(caught.value).isprintable()
