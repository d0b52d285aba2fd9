"""Pickles: an interpreter of the pickle language that imports nothing and calls nothing that a file names.

Protocols 0 to 5. A global is a `Symbol`. Calling one makes what the reader's short table of meanings says
of it, else an `Opaque`: an object of which only the class is known. A training log that mentions
`builtins.getattr` can therefore be opened. A pickle that names `os.system` and its like is refused all the
same, since it would run in any other program; that list is a courtesy, safety does not rest on it.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint, printable

__all__ = ["MAX_BYTES", "Blob", "Opaque", "Stream", "Symbol", "load"]

MAX_BYTES = 256 << 20  # of one pickle; training logs of real files reach tens of MB
MIN_BLOB = 1 << 14  # bytes of what is worth leaving in the file
MAX_STEPS = 4_000_000  # opcodes and copied items; a large model with its optimizer takes some 100,000

RUNS_CODE = frozenset({  # modules; by root, or wherever a dotted name walks into them
    "_pickle", "bdb", "cProfile", "code", "codeop", "commands", "ctypes", "importlib", "marshal", "nt", "os", "pdb",
    "pickle", "popen2", "posix", "pty", "profile", "runpy", "shutil", "socket", "subprocess", "sys", "timeit",
    "webbrowser",
})  # fmt: skip
RUNS_CODE_BUILTINS = frozenset({"__import__", "breakpoint", "compile", "eval", "exec", "execfile", "input", "open"})
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}


@dataclass(frozen=True, slots=True)
class Symbol:
    """A global that a pickle names, never looked up.

    >>> str(Symbol("collections", "OrderedDict"))
    'collections.OrderedDict'
    """

    module: str
    name: str

    def __str__(self) -> str:
        return printable(f"{self.module}.{self.name}")


@dataclass(eq=False, repr=False, slots=True)
class Opaque:
    """An object that was not made: the symbol that would have made it, and what the pickle filled it with."""

    symbol: Symbol
    why: str | None = None  # why it is no tensor, where the reader knows that one was meant
    items: dict[Any, Any] | None = None  # of a dict's subclass
    state: Any = None  # what its __setstate__ would have been given
    arguments: tuple[Any, ...] = ()  # of the call that would have made it


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes, or text in UTF-8, that were left where they lie."""

    offset: int
    nbytes: int
    is_text: bool


class Stream(Protocol):
    """What a pickle is read from. Both reads return less than asked for at the end, never raise."""

    def read(self, count: int, /) -> bytes: ...
    def readline(self) -> bytes: ...
    def tell(self) -> int: ...


Meanings = Mapping[Symbol, Callable[..., Any]]


def load(
    stream: Stream,
    file: Path,
    meanings: Meanings,
    resolve: Callable[[Any], Any],
    skip: Callable[[int], bool] | None = None,
) -> Any:
    """The value of the pickle at `stream`, which is left behind its last byte.

    `meanings` says what a call of a symbol yields, given the call's arguments; `resolve` gives the object of a
    persistent id. Either may raise ValueError or TypeError for what makes no sense. With `skip`, which
    moves the stream by so many bytes or says False if it has not as many, long bytes and text become a Blob.
    Raises DamagedCheckpoint for a malformed pickle, UnsafeCheckpoint for code and bombs.
    """
    machine = _Machine(file, {**COLLECTIONS, **meanings}, resolve)
    try:
        while (opcode := CODES[stream.read(1)]).name != "STOP":
            machine.spend(1)
            argument = _argument(opcode, stream, skip) if opcode.arg else None
            OPCODES[opcode.name](machine, argument)
        return machine.stack.pop()
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise DamagedCheckpoint(
            f"its pickle breaks off or makes no sense at byte {stream.tell()}", file=file, cure="fetch it again"
        ) from error


def _argument(opcode: Any, stream: Any, skip: Callable[[int], bool] | None) -> Any:
    width = LONG.get(opcode.name) if skip else None
    if not width:
        return opcode.arg.reader(stream)
    length = stream.read(width)
    nbytes, offset = int.from_bytes(length, "little"), stream.tell()
    if nbytes < MIN_BLOB:
        return opcode.arg.reader(io.BytesIO(length + stream.read(nbytes)))
    if not (skip and skip(nbytes)):
        raise ValueError
    return Blob(offset, nbytes, "UNICODE" in opcode.name)


class _Machine:
    """A stack, the stacks below its marks, and a memo."""

    def __init__(self, file: Path, meanings: Meanings, resolve: Callable[[Any], Any]) -> None:
        self.file, self.meanings, self.resolve = file, meanings, resolve
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def spend(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MAX_STEPS:
            raise UnsafeCheckpoint(f"its pickle takes more than {MAX_STEPS:,} steps", file=self.file)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def drop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.drop_to_mark()

    def drop_to_mark(self) -> None:
        self.since_mark()

    def top(self, count: int) -> None:
        """Make a tuple of the topmost `count` values."""
        if count > len(self.stack):
            raise IndexError
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def put(self, index: int) -> None:
        if not 0 <= index <= MAX_STEPS:
            raise ValueError
        self.memo[index] = self.stack[-1]

    def symbol(self, module: Any, name: Any) -> Symbol:
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError
        module = PYTHON_2.get(module, module)
        reached = {module.split(".")[0], *name.split(".")}  # a dotted name may walk from a module into another
        if reached & RUNS_CODE or (module == "builtins" and name in RUNS_CODE_BUILTINS):
            raise UnsafeCheckpoint(
                f"its pickle names {Symbol(module, name)}, which runs code in a program that unpickles it",
                file=self.file,
                cure="do not load it anywhere; get it from a source that you trust",
            )
        return Symbol(module, name)

    def call(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Opaque):
            function = function.symbol
        if not isinstance(function, Symbol) or not isinstance(arguments, tuple):
            raise TypeError
        meaning = self.meanings.get(function)
        if meaning is None:
            return Opaque(function, arguments=arguments)
        self.spend(sum(len(argument) for argument in arguments if isinstance(argument, list | tuple | dict)))
        return meaning(*arguments)

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        self.push(self.call(function, arguments))

    def instantiate(self, items: list[Any]) -> None:
        self.push(self.call(items[0], tuple(items[1:])))

    def instantiate_with_keywords(self) -> None:
        keywords, arguments, symbol = self.stack.pop(), self.stack.pop(), self.stack.pop()
        if not isinstance(symbol, Symbol):
            raise TypeError
        self.push(Opaque(symbol) if keywords else self.call(symbol, arguments))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Opaque):
            target.state = state
        elif not isinstance(target, dict):  # a dict's attributes (a state dict's `_metadata`) say nothing
            raise TypeError

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Opaque):
            target.items = {} if target.items is None else target.items
            target = target.items
        if not isinstance(target, dict):
            raise TypeError
        target.update(_pairs(items))

    def append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):  # a list's subclass
            raise TypeError


def _key(value: Any) -> Any:
    """A dict's key whose hash takes no time to compute and cannot be made to collide; others are kept apart."""
    plain = isinstance(value, str | bytes | float | Symbol | Opaque | None)
    if plain or (isinstance(value, int) and value.bit_length() <= 64):
        return value
    return Opaque(Symbol("builtins", type(value).__name__))


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return {_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)}


def _mapping(items: Any = ()) -> dict[Any, Any]:
    return items if isinstance(items, dict) else {_key(key): value for key, value in items}


COLLECTIONS: Meanings = {
    Symbol("collections", "OrderedDict"): _mapping,
    Symbol("collections", "Counter"): _mapping,
    Symbol("collections", "defaultdict"): lambda factory=None, items=(): _mapping(items),
    Symbol("builtins", "tuple"): lambda items=(): tuple(items),
    Symbol("builtins", "set"): list,
    Symbol("builtins", "frozenset"): list,
}

CODES = {code.code.encode("latin-1"): code for code in pickletools.opcodes}
LONG = {"BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8, "BINUNICODE": 4, "BINUNICODE8": 8, "BINSTRING": 4}
LITERALS = [  # opcodes that push their own argument
    code.name
    for code in pickletools.opcodes
    if code.arg and not code.stack_before and code.stack_after not in ([], [pickletools.anyobject])
]
OPCODES: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(LITERALS, _Machine.push),
    "NONE": lambda m, _: m.push(None),
    "NEWTRUE": lambda m, _: m.push(True),
    "NEWFALSE": lambda m, _: m.push(False),
    "EMPTY_TUPLE": lambda m, _: m.push(()),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, _: m.push([])),  # a set is read as a list
    "EMPTY_DICT": lambda m, _: m.push({}),
    "MARK": lambda m, _: m.mark(),
    "POP": lambda m, _: m.drop(),
    "POP_MARK": lambda m, _: m.drop_to_mark(),
    "DUP": lambda m, _: m.push(m.stack[-1]),
    "TUPLE": lambda m, _: m.push(tuple(m.since_mark())),
    "TUPLE1": lambda m, _: m.top(1),
    "TUPLE2": lambda m, _: m.top(2),
    "TUPLE3": lambda m, _: m.top(3),
    **dict.fromkeys(("LIST", "FROZENSET"), lambda m, _: m.push(m.since_mark())),
    "DICT": lambda m, _: m.push(_pairs(m.since_mark())),
    "APPEND": lambda m, _: m.append([m.stack.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, _: m.append(m.since_mark())),
    "SETITEM": lambda m, _: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    "SETITEMS": lambda m, _: m.set_items(m.since_mark()),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, index: m.push(m.memo[index])),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda m, _: m.put(len(m.memo)),
    "GLOBAL": lambda m, names: m.push(m.symbol(*names.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.push(m.symbol(m.stack.pop(-2), m.stack.pop())),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), lambda m, code: m.push(Symbol("copyreg", f"extension {code}"))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, _: m.reduce()),
    "NEWOBJ_EX": lambda m, _: m.instantiate_with_keywords(),
    "OBJ": lambda m, _: m.instantiate(m.since_mark()),
    "INST": lambda m, names: m.instantiate([m.symbol(*names.split(" ", 1)), *m.since_mark()]),
    "BUILD": lambda m, _: m.build(),
    "PERSID": lambda m, name: m.push(m.resolve(name)),
    "BINPERSID": lambda m, _: m.push(m.resolve(m.stack.pop())),
}  # NEXT_BUFFER and READONLY_BUFFER need buffers that no file carries
