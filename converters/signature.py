"""Signatures: the names by which a family is detected, read from its file before anything else of it.

There are many families and a checkpoint is of few; to the others it costs this much and no more.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache

from converters.errors import MappingError
from converters.names import Pattern, split
from converters.numbering import renumber
from converters.strict_yaml import load

__all__ = ["Signature", "read_signature"]

_BLOCKS = re.compile(r"^(?:detect|strip|renumber|tables):.*\n?(?:(?![A-Za-z_\"']).*\n)*", re.MULTILINE)
_NOT_LITERAL = re.compile(r"\{[^{}]*\}|[./*]")


@dataclass(frozen=True)
class Signature:
    """What must be among a checkpoint's names, and the prefixes that these may have."""

    detect: tuple[tuple[Pattern, ...], ...]  # one of each
    strip: tuple[Pattern, ...]
    renumber: tuple[str, ...]  # what automatic names begin with

    def stripped(self, name: str) -> tuple[str, ...]:
        """A source name's segments without the prefixes that the family may carry."""
        segments = split(name)
        for prefix in self.strip:
            found = prefix.match(segments)
            if found and found.rest:
                segments = found.rest
        return segments

    def segments(self, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
        """Every source name's segments as the rows see them: without prefixes, automatic names renumbered."""
        return renumber({name: self.stripped(name) for name in names}, self.renumber)

    def applies(self, names: Collection[str]) -> bool:
        """Whether a checkpoint with these names may be of the family."""
        text = "\n".join(names)
        if not self.renumber and not all(
            any(_literal(one.text) in text for one in patterns) for patterns in self.detect
        ):
            return False
        segments = [split(name) for name in names]
        if self.strip or self.renumber:
            segments += self.segments(names).values()
        return all(any(one.match(name) for one in patterns for name in segments) for patterns in self.detect)


@lru_cache(maxsize=256)
def read_signature(text: str) -> Signature | None:
    """That of a mapping file's text; None where only the whole file can tell, or what is wrong with it.

    >>> bool(read_signature("targets: any\\ndetect:\\n  - a.{i}\\nrules: [").applies(["a.1.weight"]))
    True
    """
    try:
        data, _ = load("".join(_BLOCKS.findall(text)), "")
        tables, strip = data.get("tables", {}), data.get("strip", [])
        return Signature(
            tuple(
                tuple(Pattern.parse(one, tables) for one in ([patterns] if isinstance(patterns, str) else patterns))
                for patterns in data["detect"]
            ),
            tuple(Pattern.parse(one.rstrip("./")) for one in ([strip] if isinstance(strip, str) else strip)),
            tuple(data.get("renumber", [])),
        )
    except (MappingError, AttributeError, KeyError, TypeError, ValueError):
        return None


@lru_cache(maxsize=4096)
def _literal(pattern: str) -> str:
    """The longest text that every name has which the pattern matches.

    >>> _literal("stages.{i}.blocks.*.attn.w_msa.{q|k}")
    'stages'
    """
    return max(_NOT_LITERAL.split(pattern), key=len)
