"""Plain values: what metadata may hold, of bounded size whatever the file says."""

from __future__ import annotations

from typing import Any

from converters.readers.pickles import Opaque, Symbol
from converters.tensors import LazyTensor

__all__ = ["Plain"]

MAX_DEPTH = 12


class Plain:
    """A maker of plain values (None, bool, int, float, str, list, dict), with room for so many characters.

    What has no plain form, or finds no room, becomes a word in angle brackets.

    >>> Plain(room=100)({"epoch": 300, "lr": [1e-3], "args": Opaque(Symbol("argparse", "Namespace"))})
    {'epoch': 300, 'lr': [0.001], 'args': '<argparse.Namespace>'}
    """

    def __init__(self, room: int = 1_000_000) -> None:
        self.room = room

    def __call__(self, value: Any, depth: int = 0) -> Any:
        self.room -= len(value) + 1 if isinstance(value, str) else 1
        if depth > MAX_DEPTH or self.room < 0:
            return "<too much>"
        if isinstance(value, Opaque):
            content = value.items if value.items is not None else value.state
            return self(content, depth + 1) if isinstance(content, dict) else f"<{value.symbol}>"
        if isinstance(value, dict):
            return self._mapping(value, depth)
        if isinstance(value, list | tuple):
            return self._sequence(value, depth)
        if isinstance(value, str):
            return value.encode("utf-8", "backslashreplace").decode()
        if value is None or isinstance(value, bool | float) or (type(value) is int and value.bit_length() <= 64):
            return value
        if isinstance(value, LazyTensor):
            return f"<{value.spec.dtype} tensor>"
        return str(value) if isinstance(value, Symbol) else f"<{type(value).__name__}>"

    def _mapping(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        for key, item in value.items():
            if self.room < 0:
                break
            plain[str(self(key))] = self(item, depth + 1)
        return plain

    def _sequence(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        plain: list[Any] = []
        for item in value:
            if self.room < 0:
                break
            plain.append(self(item, depth + 1))
        return plain
