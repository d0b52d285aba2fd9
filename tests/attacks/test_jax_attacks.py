"""Damaged and hostile checkpoints of JAX's kind: NumPy archives, Flax's msgpack, Orbax's folders."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest

from converters.errors import CheckpointError
from converters.readers import open_checkpoint

SIX = struct.pack("<6f", *range(6))


def npy(header: str = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }", data: bytes = SIX) -> bytes:
    text = header.encode("latin-1") + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def shaped(shape: str, descr: str = "<f4") -> bytes:
    return npy(f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}")


def archive(members: list[tuple[str, bytes]] | dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(stream, "w", method) as target:
        warnings.simplefilter("ignore")  # of duplicates
        for name, data in members.items() if isinstance(members, dict) else members:
            target.writestr(name, data)
    return stream.getvalue()


def patched(data: bytes, *changes: tuple[bytes, bytes]) -> bytes:
    for old, new in changes:
        assert old in data and len(old) == len(new)
        data = data.replace(old, new)
    return data


def sizes(claimed: int) -> bytes:
    """A deflated member whose headers claim that it inflates to so many bytes."""
    data = npy(data=bytes(4_000_000))
    found = struct.pack("<I", len(data))
    return patched(archive({"w.npy": data}, zipfile.ZIP_DEFLATED), (found, struct.pack("<I", claimed)))


def text(value: str) -> bytes:
    return b"\xd9" + bytes([len(value)]) + value.encode()


def array(shape: bytes = b"\x92\x02\x03", dtype: str = "float32", data: bytes = SIX, size: int | None = None) -> bytes:
    """Flax's extension of an array."""
    inner = b"\x93" + shape + text(dtype) + b"\xc4" + bytes([len(data) if size is None else size]) + data
    return b"\xc7" + bytes([len(inner)]) + b"\x01" + inner


def chunked(shape: bytes, *chunks: bytes) -> bytes:
    held = bytes([0x80 | len(chunks)]) + b"".join(text(str(number)) + chunk for number, chunk in enumerate(chunks))
    return b"\x81\xa1w\x83" + text("__msgpack_chunked_array__") + b"\xc3" + text("shape") + shape + text("chunks") + held


LINE = b"\x81\xa10"  # {"0": ...
SOUND = {
    "npz": archive({"a/w.npy": npy(), "a/v.npy": npy()}),
    "deflated": archive({"a/w.npy": npy(), "a/v.npy": npy()}, zipfile.ZIP_DEFLATED),
    "flax": b"\x81\xa1a\x82\xa1w" + array() + b"\xa1v" + array(),
}
CHECKED = {"npz", "deflated"}


def opened(path: Path) -> dict[str, Any]:
    return {name: (tensor.spec, bytes(tensor.read())) for name, tensor in open_checkpoint(path).tensors.items()}


@pytest.mark.parametrize("form", SOUND)
def test_a_flip_or_a_cut_raises_nothing_else(form: str, tmp_path: Path) -> None:
    path, intact = tmp_path / form, SOUND[form]
    path.write_bytes(intact)
    before = opened(path)
    assert {name: raw for name, (_, raw) in before.items()} == {"a/w": SIX, "a/v": SIX}
    for at in range(len(intact)):
        damaged = [intact[:at], *(intact[:at] + bytes([intact[at] ^ 1 << bit]) + intact[at + 1 :] for bit in range(8))]
        for number, data in enumerate(damaged):
            path.write_bytes(data)
            try:
                found = opened(path)
                assert number, at
                if form in CHECKED:  # a member's name has no checksum
                    assert sorted(found.values(), key=str) == sorted(before.values(), key=str) or found.keys() != before.keys()
            except CheckpointError as error:
                assert str(error).startswith(str(path)) and str(error).isprintable()


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "npz: objects": (lambda: archive({"w.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }", b"\x80\x04N.")}), "w: it holds Python objects, which only unpickling"),
    "npz: terabytes": (lambda: archive({"w.npy": shaped("(1099511627776,)")}), "w: has 24 bytes, but shape (1099511627776,)"),
    "npz: overflow": (lambda: archive({"w.npy": shaped("(4294967296, 4294967296, 4294967296)")}), "w: has 24 bytes, but shape"),
    "npz: overflow beside zero": (lambda: archive({"w.npy": shaped("(4611686018427387904, 0, 4)")}), "w: has 24 bytes, but"),
    "npz: negative": (lambda: archive({"w.npy": shaped("(-2, -3)")}), "w: its header is not an array's"),
    "npz: a huge number": (lambda: archive({"w.npy": shaped(f"({'9' * 5000},)")}), "w: its shape makes no sense"),
    "npz: rank": (lambda: archive({"w.npy": shaped(f"({'1, ' * 200})")}), "w: its shape makes no sense"),
    "npz: no numbers between commas": (lambda: archive({"w.npy": shaped("(2,,3)")}), "w: its shape makes no sense"),
    "npz: code": (lambda: archive({"w.npy": npy("__import__('os').system('touch canary')")}), "w: its header is not an array's"),
    "npz: code in a shape": (lambda: archive({"w.npy": shaped("(2, len('abc'))")}), "w: its header is not an array's"),
    "npz: spaces": (lambda: archive({"w.npy": npy("{" + " " * 15_000 + "x")}), "w: its header is not an array's"),
    "npz: digits": (lambda: archive({"w.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1" * 15_000)}), "w: its header"),
    "npz: brackets": (lambda: archive({"w.npy": npy("(" * 15_000)}), "w: its header is not an array's"),
    "npz: a long header": (lambda: archive({"w.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}), "w: its header is not an array's"),
    "npz: another version": (lambda: archive({"w.npy": b"\x93NUMPY\x09\x00" + npy()[8:]}), "w: is no array"),
    "npz: no array": (lambda: archive({"w.npy": b""}), "w: is no array"),
    "npz: bytes behind": (lambda: archive({"w.npy": npy() + b"x"}), "w: has 25 bytes, but shape (2, 3) of float32"),
    "npz: one name": (lambda: archive([("w.npy", npy()), ("w.npy", npy())]), "two of its zip members have one name"),
    "npz: a name that leaves": (lambda: archive({"../w.npy": npy()}), "a zip member would leave its folder"),
    "npz: terminal codes": (lambda: archive({"\x1b[2J.npy": shaped("(5,)")}), "\\x1b[2J: has 24 bytes"),
    "npz: an impossible size": (lambda: sizes(1 << 31), "bytes do not inflate to 2147483648"),
    "npz: too small a size": (lambda: sizes(1000), "w: has 930 bytes, but shape (2, 3) of float32 takes another number"),
    "npz: encrypted": (lambda: patched(archive({"w.npy": npy()}), (b"\x14\0\0\0\0\0", b"\x14\0\x01\0\0\0")), "the two headers of zip member w.npy"),
    "npz: prefixed": (lambda: b"PK\x03\x04" + archive({"w.npy": npy()}), "do not begin where the file does"),
    "npy": (lambda: npy(), "is one array without a name, not a state dict"),
    "npy: objects": (lambda: npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }", b"\x80\x04N."), "is one array without a name"),
    "flax: a map of 2^32": (lambda: b"\xdf\xff\xff\xff\xff\xa1w\x01", "ends in the midst of 1 bytes at byte 8"),
    "flax: a list of 2^32": (lambda: b"\x81\xa1w\xdd\xff\xff\xff\xff\x01", "w/1: ends in the midst of 1 bytes"),
    "flax: a text of 2^32": (lambda: b"\x81\xa1w\xdb\xff\xff\xff\xff", "w: a text takes 4294967295 bytes"),
    "flax: a key of 2^32": (lambda: b"\x82\xa1w\x01\xdb\xff\xff\xff\xff", "a text takes 4294967295 bytes"),
    "flax: an array of 2^32": (lambda: b"\x81\xa1w\xc9\xff\xff\xff\xff\x01", "w: ends in the midst of 0 bytes"),
    "flax: maps in maps": (lambda: b"\x81\xa1a" * 100_000 + b"\x01", "or nests them too deeply"),
    "flax: long names": (lambda: (b"\x81\xa1a\x81\xda\x07\xff" + b"a" * 2047) * 20 + b"\x01", "or nests them too deeply"),
    "flax: many values": (lambda: b"\x81\xa1w\xdd\x00\x0f\xff\xff" + bytes(1 << 20), "holds more than 131072 values"),
    "flax: terabytes": (lambda: b"\x81\xa1w" + array(b"\x91\xcf" + (1 << 40).to_bytes(8, "big")), "w: has 24 bytes, but shape (1099511627776,)"),
    "flax: overflow": (lambda: b"\x81\xa1w" + array(b"\x92" + b"\xcf" + b"\x7f" * 8 + b"\xcf" + b"\x7f" * 8), "w: its shape is absurd"),
    "flax: negative": (lambda: b"\x81\xa1w" + array(b"\x92\xfe\xfd"), "w: its shape is absurd"),
    "flax: a float in a shape": (lambda: b"\x81\xa1w" + array(b"\x92\x02\xca" + struct.pack(">f", 3)), "w: its shape makes no sense"),
    "flax: truth in a shape": (lambda: b"\x81\xa1w" + array(b"\x92\x02\xc3"), "w: its shape makes no sense"),
    "flax: rank": (lambda: b"\x81\xa1w" + array(b"\xdd\xff\xff\xff\xff"), "w: its shape makes no sense"),
    "flax: too few bytes": (lambda: b"\x81\xa1w" + array(size=20), "w: its array is not shape, dtype and bytes"),
    "flax: too many bytes": (lambda: b"\x81\xa1w" + array(size=25), "w: its array is not shape, dtype and bytes"),
    "flax: a pair": (lambda: b"\x81\xa1w\xc7\x03\x01\x92\x01\x02", "w: its array is not shape, dtype and bytes"),
    "flax: one name": (lambda: b"\x82\xa1w" + array() + b"\xa1w" + array(), "has two values called 'w'"),
    "flax: one name by two ways": (lambda: b"\x82\xa3a/w" + array() + b"\xa1a\x81\xa1w" + array(), "a/w: is the name of two values"),
    "flax: a key that is a map": (lambda: b"\x82\xa1w\x01\x80\x01", "a key is no name but a map"),
    "flax: no UTF-8": (lambda: b"\x82\xa1w\x01\xa1\xff\x01", "a text is not UTF-8"),
    "flax: nothing": (lambda: b"\x81\xa1w\xc1", "w: byte 3 begins nothing"),
    "flax: bytes behind": (lambda: b"\x81\xa1w" + array() + b"x", "goes on for 1 bytes after its end"),
    "flax: terminal codes": (lambda: b"\x82\xa1w\x01\xa4\x1b[2J" + array(size=20), ": \\x1b[2J: its array"),
    "flax: chunks of another size": (lambda: chunked(LINE + b"\x07", array(b"\x91\x06")), "w: has 24 bytes, but shape (7,)"),
    "flax: chunks of two kinds": (lambda: chunked(LINE + b"\x0c", array(b"\x91\x06"), array(b"\x91\x06", "int32")), "w: its chunks do not belong"),
    "flax: chunks that are numbers": (lambda: chunked(LINE + b"\x07", b"\x07"), "w: its chunks do not belong together"),
    "flax: no chunks": (lambda: chunked(LINE + b"\x00"), "w: its chunks are not shape and chunks"),
    "flax: a shape of text": (lambda: chunked(LINE + text("x"), array(b"\x91\x06")), "w: its chunks do not belong together"),
    "flax: only a number": (lambda: b"\x81\xa1w\x07", "holds no weights, only w"),
}  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    here, folder = Path(__file__).parent, tmp_path_factory.mktemp("attacks")
    files = [folder / f"{number}.bin" for number in range(len(ATTACKS))]
    for file, (make, _) in zip(files, ATTACKS.values(), strict=True):
        file.write_bytes(make())
    command = [sys.executable, here / "watched.py", here.parents[1], *files]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300, cwd=folder)
    assert not (folder / "canary").exists()
    return dict(zip(ATTACKS, json.loads(child.stdout).values(), strict=True))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_one_line(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Within 2 GiB and 10 seconds each, and no other file is opened."""
    outcome = outcomes[name]
    assert outcome["broken"] == []
    assert ATTACKS[name][1] in outcome.get("refusal", outcome)
    assert outcome["refusal"].isprintable() and len(outcome["refusal"]) < 1000


def store(folder: Path, *keys: list[str], **options: Any) -> Path:
    """A folder as Orbax lays it out, of six numbers in a database under each of `keys`."""
    import tensorstore

    base = {"driver": "file", "path": f"{folder}/"}
    entries = {}
    for number, names in enumerate(keys or (["w"],)):
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{'.'.join(names)}/", "config": {"max_inline_value_bytes": 0}}
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


def rewritten(folder: Path, text: str) -> Path:
    (folder / "_METADATA").write_text(text)
    return folder


FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a pipe": (lambda path: pipe(store(path)), "pipe: is not a regular file"),
    "a link": (lambda path: link(store(path)), "link: is a link that leaves the folder"),
    "data above the folder": (lambda path: moved(store(path)), "w: tensorstore refuses it"),
    "no data": (lambda path: emptied(store(path)), "w: tensorstore refuses it"),
    "no such array": (lambda path: relisted(store(path), ["v"]), "v: tensorstore refuses it"),
    "terabytes": (lambda path: store(path, shape=[1 << 40], chunks=[1]), "w: its shape (1099511627776,), in chunks of (1,)"),
    "chunks of terabytes": (lambda path: store(path, shape=[1], chunks=[1 << 40]), "in chunks of (1099511627776,), takes more"),
    "nothing written": (lambda path: store(path, shape=[4], chunks=[4]), "w: tensorstore refuses it"),
    "keys that leave": (lambda path: relisted(store(path), ["../../etc"]), "../../etc: its keys would leave the folder"),
    "an empty key": (lambda path: relisted(store(path), [""]), "its keys would leave the folder"),
    "one name by two ways": (lambda path: relisted(store(path), ["a", "b"], ["a/b"]), "a/b: is the name of two arrays"),
    "terminal codes": (lambda path: relisted(store(path), ["\x1b[2J"]), ": \\x1b[2J: tensorstore refuses it"),
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
