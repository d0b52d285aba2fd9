"""Damaged and hostile NumPy archives."""

from __future__ import annotations

import io
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


def opened(path: Path) -> dict[str, Any]:
    return {name: (tensor.spec, bytes(tensor.read())) for name, tensor in open_checkpoint(path).tensors.items()}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_flip_changes_no_array_and_a_cut_is_found(method: int, spoil: Callable[..., Any], tmp_path: Path) -> None:
    path, intact = tmp_path / "x.npz", archive({"a/w.npy": npy(), "a/v.npy": npy()}, method)
    path.write_bytes(intact)
    before = opened(path)
    assert {name: raw for name, (_, raw) in before.items()} == {"a/w": SIX, "a/v": SIX}
    for at, data in spoil(intact):
        path.write_bytes(data)
        try:
            found = opened(path)
            assert len(data) == len(intact), at
            assert found == before or found.keys() != before.keys()  # a member's name has no checksum
            assert {raw for _, raw in found.values()} <= {SIX}
        except CheckpointError as error:
            assert str(error).startswith(str(path)) and str(error).isprintable()


ATTACKS: dict[str, tuple[Callable[[], bytes], str]] = {
    "objects": (
        lambda: archive({"w.npy": npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }", b"\x80\x04N.")}),
        "w: it holds Python objects, which only unpickling",
    ),
    "terabytes": (
        lambda: archive({"w.npy": shaped("(1099511627776,)")}),
        "w: has 24 bytes, but shape (1099511627776,)",
    ),
    "overflow": (
        lambda: archive({"w.npy": shaped("(4294967296, 4294967296, 4294967296)")}),
        "w: has 24 bytes, but shape",
    ),
    "overflow beside zero": (lambda: archive({"w.npy": shaped("(4611686018427387904, 0, 4)")}), "w: has 24 bytes, but"),
    "negative": (lambda: archive({"w.npy": shaped("(-2, -3)")}), "w: its header is not an array's"),
    "a huge number": (lambda: archive({"w.npy": shaped(f"({'9' * 5000},)")}), "w: its shape makes no sense"),
    "rank": (lambda: archive({"w.npy": shaped(f"({'1, ' * 200})")}), "w: its shape makes no sense"),
    "no numbers between commas": (lambda: archive({"w.npy": shaped("(2,,3)")}), "w: its shape makes no sense"),
    "code": (
        lambda: archive({"w.npy": npy("__import__('os').system('touch canary')")}),
        "w: its header is not an array's",
    ),
    "code in a shape": (lambda: archive({"w.npy": shaped("(2, len('abc'))")}), "w: its header is not an array's"),
    "spaces": (lambda: archive({"w.npy": npy("{" + " " * 15_000 + "x")}), "w: its header is not an array's"),
    "digits": (
        lambda: archive({"w.npy": npy("{'descr': '<f4', 'fortran_order': False, 'shape': (" + "1" * 15_000)}),
        "w: its header",
    ),
    "brackets": (lambda: archive({"w.npy": npy("(" * 15_000)}), "w: its header is not an array's"),
    "a long header": (
        lambda: archive({"w.npy": b"\x93NUMPY\x02\x00\xff\xff\xff\xff"}),
        "w: its header is not an array's",
    ),
    "another version": (lambda: archive({"w.npy": b"\x93NUMPY\x09\x00" + npy()[8:]}), "w: is no array"),
    "no array": (lambda: archive({"w.npy": b""}), "w: is no array"),
    "bytes behind": (lambda: archive({"w.npy": npy() + b"x"}), "w: has 25 bytes, but shape (2, 3) of float32"),
    "one name": (lambda: archive([("w.npy", npy()), ("w.npy", npy())]), "two of its zip members have one name"),
    "a name that leaves": (lambda: archive({"../w.npy": npy()}), "a zip member would leave its folder"),
    "terminal codes": (lambda: archive({"\x1b[2J.npy": shaped("(5,)")}), "\\x1b[2J: has 24 bytes"),
    "an impossible size": (lambda: sizes(1 << 31), "bytes do not inflate to 2147483648"),
    "too small a size": (lambda: sizes(1000), "w: has 930 bytes, but shape (2, 3) of float32 takes another number"),
    "encrypted": (
        lambda: patched(archive({"w.npy": npy()}), (b"\x14\0\0\0\0\0", b"\x14\0\x01\0\0\0")),
        "the two headers of zip member w.npy",
    ),
    "prefixed": (lambda: b"PK\x03\x04" + archive({"w.npy": npy()}), "do not begin where the file does"),
    "npy": (lambda: npy(), "is one array without a name, not a state dict"),
    "npy: objects": (
        lambda: npy("{'descr': '|O', 'fortran_order': False, 'shape': (), }", b"\x80\x04N."),
        "is one array without a name",
    ),
}


@pytest.fixture(scope="module")
def outcomes(watch: Callable[..., Any]) -> dict[str, dict[str, Any]]:
    return watch({name: lambda file, make=make: file.write_bytes(make()) for name, (make, _) in ATTACKS.items()})


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_refused_in_one_line(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    """Within 2 GiB and 10 seconds each, and no other file is opened."""
    outcome = outcomes[name]
    assert outcome["broken"] == []
    assert ATTACKS[name][1] in outcome.get("refusal", outcome)
    assert outcome["refusal"].isprintable() and len(outcome["refusal"]) < 1000
