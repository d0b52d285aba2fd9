"""The pickle interpreter: the standard pickler's output in every protocol, symbols that stay symbols, bombs."""

from __future__ import annotations

import collections
import functools
import io
import operator
import pickle
import random
import struct
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from converters.errors import ConverterError, DamagedCheckpoint, UnsafeCheckpoint
from converters.readers.pickles import Opaque, Symbol, load

FILE = Path("model.pth")


def read(data: bytes) -> Any:
    return load(io.BytesIO(data), FILE, {}, lambda name: ("persistent", name))


SHARED = ["shared"]
PLAIN = {
    "numbers": [0, 1, 255, 256, 65536, -1, 2**40, -(2**200), 0.5, True, False, None],
    "text": ("", "a" * 300, "naïve\n\\ \N{SNOWMAN}", b"", b"\x00\xff" * 200),
    "containers": [[], (), {}, (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {"a": {"b": []}}, {1: 2, None: 3, 2.5: 4}],
    "sharing": [SHARED, SHARED, {"again": SHARED}],
    "ordered": collections.OrderedDict([("b", 1), ("a", 2)]),
    "counted": collections.Counter("aab"),
    "long": list(range(3000)),
}


@pytest.mark.parametrize("protocol", range(6))
def test_reads_what_the_pickler_writes(protocol: int) -> None:
    expected = PLAIN if protocol > 2 else PLAIN | {"text": PLAIN["text"][:3]}  # bytes are a call of _codecs.encode
    found = read(pickle.dumps(expected, protocol))
    assert found == expected
    assert list(found["ordered"]) == ["b", "a"]
    assert found["sharing"][0] is found["sharing"][1]


def test_a_set_is_a_list_and_a_bytearray_itself() -> None:
    assert sorted(read(pickle.dumps({1, 2}, 4))) == sorted(read(pickle.dumps({1, 2}, 2))) == [1, 2]
    assert read(pickle.dumps(frozenset({1}), 4)) == [1]
    assert read(pickle.dumps(bytearray(b"abc"), 5)) == bytearray(b"abc")
    assert read(pickle.dumps(collections.defaultdict(list, a=[1]), 4)) == {"a": [1]}


class Config(dict):  # type: ignore[type-arg]
    """A dict's subclass that no program but this one knows."""


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    ("value", "symbol"),
    [
        (Namespace(lr=1), "argparse.Namespace"),
        (functools.partial(print, end=""), "functools.partial"),
        (operator.attrgetter("a"), "operator.attrgetter"),
        ("".join, "builtins.getattr"),
        (Path("a"), "pathlib.PosixPath"),
        (1j, "builtins.complex"),
    ],
)
def test_what_has_no_meaning_is_opaque(value: Any, symbol: str, protocol: int) -> None:
    found = read(pickle.dumps([value], protocol))
    assert isinstance(found[0], Opaque)
    assert str(found[0].symbol) == symbol


def test_an_opaque_keeps_its_items_and_state() -> None:
    assert read(pickle.dumps(Namespace(lr=1), 4)).state == {"lr": 1}
    assert read(pickle.dumps(Config(lr=1), 2)).items == {"lr": 1}


def test_meanings_and_persistent_ids() -> None:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            return ("id", 7) if value is SHARED else None

    stream = io.BytesIO()
    Pickler(stream, 2).dump([SHARED, Namespace()])
    meanings = {Symbol("argparse", "Namespace"): lambda *arguments: arguments}
    found = load(io.BytesIO(stream.getvalue()), FILE, meanings, lambda name: name[1] + 1)
    assert found == [8, ()]


class Stream(io.BytesIO):
    def skip(self, count: int) -> bool:
        return self.seek(count, io.SEEK_CUR) <= len(self.getbuffer())


@pytest.mark.parametrize("protocol", range(2, 6))
def test_long_data_is_left_where_it_is(protocol: int) -> None:
    for long in ["é" * 9000, *([b"\0" * 20_000, bytearray(20_000)] if protocol == 5 else [])]:
        data = pickle.dumps({"long": long, "short": "é" * 1000, "after": [1]}, protocol)
        stream = Stream(data + b"rest")
        found = load(stream, FILE, {}, id, stream.skip)
        assert (found["short"], found["after"], stream.read()) == ("é" * 1000, [1], b"rest")
        blob = found["long"]
        raw = data[blob.offset : blob.offset + blob.nbytes]
        assert raw.decode() == long if blob.is_text else raw == long
        stream = Stream(data[: blob.offset + 10])
        with pytest.raises(DamagedCheckpoint, match="its pickle breaks off"):
            load(stream, FILE, {}, id, stream.skip)


def test_an_opaque_keeps_its_arguments() -> None:
    found = read(pickle.dumps(complex(1, 2), 4))
    assert (found.symbol, found.arguments) == (Symbol("builtins", "complex"), (1.0, 2.0))


def test_the_stream_is_left_behind_the_pickle() -> None:
    stream = io.BytesIO(pickle.dumps(1) + pickle.dumps(2) + b"rest")
    assert [load(stream, FILE, {}, id) for _ in range(2)] == [1, 2]
    assert stream.read() == b"rest"


def short(text: str) -> bytes:
    return b"\x8c" + bytes([len(text)]) + text.encode()


CODE = {
    "GLOBAL": b"cos\nsystem\n(S'true'\ntR.",
    "posix": b"cposix\nsystem\n.",
    "STACK_GLOBAL": b"\x80\x04" + short("os") + short("system") + b"\x93.",
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'true'\no.",
    "NEWOBJ": b"cos\nsystem\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04cos\nsystem\n)}\x92.",
    "BUILD": b"cos\nsystem\n)R}b.",
    "dotted": b"\x80\x04" + short("torch") + short("_utils.os.system") + b"\x93.",
    "reached by getattr": b"\x80\x04" + short("torch._utils") + short("os") + b"\x93.",
    "submodule": b"cimportlib.util\nfind_spec\n.",
    "eval": b"cbuiltins\neval\n.",
    "Python 2": b"c__builtin__\nexecfile\n.",
    "before a broken end": b"cos\nsystem\n(S'true'\ntR\xff\xff",
    "as an argument": b"cfunctools\npartial\n(cos\nsystem\ntR.",
    "nested pickle": b"cpickle\nloads\n.",
}


@pytest.mark.parametrize("data", CODE.values(), ids=CODE)
def test_code_is_refused_in_one_line(data: bytes) -> None:
    with pytest.raises(UnsafeCheckpoint, match=r"^model\.pth: its pickle names \S+, which runs code [^\n]*$"):
        read(data)


def text8(length: int) -> bytes:
    return b"\x8d" + struct.pack("<Q", length)


def long4(number: int) -> bytes:
    return b"\x8a\x0b" + number.to_bytes(11, "little")


FAULTS: dict[str, tuple[bytes, type[ConverterError]]] = {
    "empty": (b"", DamagedCheckpoint),
    "no STOP": (b"N", DamagedCheckpoint),
    "unknown opcode": (b"\xff.", DamagedCheckpoint),
    "empty stack": (b".", DamagedCheckpoint),
    "no mark": (b"t.", DamagedCheckpoint),
    "no memo": (b"h\x05.", DamagedCheckpoint),
    "memo index": (b"Np-1\n.", DamagedCheckpoint),
    "item of a tuple": (b")NNs.", DamagedCheckpoint),
    "item of a number": (b"K\x01NNs.", DamagedCheckpoint),
    "half a pair": (b"}(Nu.", DamagedCheckpoint),
    "call of a string": (b"S'a'\n)R.", DamagedCheckpoint),
    "arguments are a list": (b"ca\nb\n]R.", DamagedCheckpoint),
    "state of a tuple": (b")}b.", DamagedCheckpoint),
    "global of numbers": (b"\x80\x04K\x01K\x02\x93.", DamagedCheckpoint),
    "out-of-band buffer": (b"\x80\x05\x97.", DamagedCheckpoint),
    "text of 2**63 bytes": (text8(2**63) + b".", DamagedCheckpoint),
    "text of 2**62 bytes": (text8(2**62) + b".", DamagedCheckpoint),
    "text that is no UTF-8": (b"X\x01\x00\x00\x00\xff.", DamagedCheckpoint),
    "endless steps": (b"]" + b"20" * 3_000_000 + b".", UnsafeCheckpoint),
    "copies of a big list": (
        b"(" + b"N" * 100_000 + b"lq\x00" + b"cbuiltins\nset\nh\x00\x85R" * 1000,
        UnsafeCheckpoint,
    ),
}


@pytest.mark.parametrize(("data", "error"), FAULTS.values(), ids=FAULTS)
def test_faults(data: bytes, error: type[ConverterError]) -> None:
    with pytest.raises(error, match=r"^model\.pth: its pickle [^\n]*$"):
        read(data)


BOMBS = {
    "lists within lists": b"]" * 100_000 + b"a" * 99_999 + b".",
    "each list twice in the next": b"]" + b"q\x000]h\x00ah\x00a" * 100 + b".",
    "hash of a tuple that doubles": b"N" + b"2\x86" * 100 + b"}q\x00" + b"0q\x01}h\x01Ns.",
    "keys that collide": b"}" + b"".join(long4(k * (2**61 - 1)) + b"Ns" for k in range(2**16, 2**16 + 50_000)) + b".",
    "a list that holds itself": b"]q\x00h\x00a.",
    "extension code": b"\x82\x05)R.",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_bombs_do_not_go_off(data: bytes) -> None:
    read(data)


def test_damage_is_an_error_or_a_value_but_nothing_else() -> None:
    whole = pickle.dumps({**PLAIN, "long": [], "n": Namespace(a=[1])}, 4)
    for end in range(len(whole)):
        with pytest.raises(DamagedCheckpoint):
            read(whole[:end])
    chance = random.Random(0)
    for _ in range(5000):
        damaged = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            read(bytes(damaged))
        except ConverterError as error:
            assert "\n" not in str(error)
