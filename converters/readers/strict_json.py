"""Strict JSON: objects from files that nobody vouches for, of bounded cost, whose names are all distinct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from converters.errors import DamagedCheckpoint, UnsafeCheckpoint

__all__ = ["parse_json"]

MAX_MARKS = 4_000_000  # brackets and commas, which bound what it costs to parse; a safetensors entry has about ten


def parse_json(data: bytes, path: Path, what: str) -> dict[str, Any]:
    """The object that `data` is; `what` is how errors call it ("its header"). Raises CheckpointError."""
    if sum(data.count(mark) for mark in (b"[", b"{", b",")) > MAX_MARKS:
        raise UnsafeCheckpoint(f"{what} has more than {MAX_MARKS:,} brackets and commas", file=path)
    try:
        parsed = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
    except (RecursionError, MemoryError) as error:
        raise UnsafeCheckpoint(f"{what} is nested too deeply", file=path) from error
    except ValueError as error:
        raise DamagedCheckpoint(f"{what} is not valid JSON with distinct names", file=path) from error
    if not isinstance(parsed, dict):
        raise DamagedCheckpoint(f"{what} is not a JSON object", file=path)
    return parsed


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; ValueError for a name that stands twice and for text that no UTF-8 can hold."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError
    for key, value in pairs:
        (key + value if isinstance(value, str) else key).encode("utf-8")
    return found
