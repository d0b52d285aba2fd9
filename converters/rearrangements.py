"""Rearrangements: einops patterns with their axis lengths, checked when they are read.

h w i o -> o i h w              ... (c h w) -> ... (w h c), h=2, w=2
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy

__all__ = ["Rearrangement"]


@dataclass(frozen=True)
class Rearrangement:
    """How elements move.

    >>> Rearrangement.parse("(h d) i -> i h d, h=2").inverse((6, 5))
    'i h d -> (h d) i, h=2, d=3, i=5'
    """

    left: str
    right: str
    lengths: dict[str, int]  # of the axes that the text gives one to

    @classmethod
    def parse(cls, text: str) -> Rearrangement:
        """Raises ValueError with what is wrong about `text`."""
        import einops

        pattern, *sizes = (part.strip() for part in text.split(","))
        left, arrow, right = (part.strip() for part in pattern.partition("->"))
        lengths: dict[str, int] = {}
        for size in sizes:
            found = re.fullmatch(r"([A-Za-z_]\w*)\s*=\s*([1-9][0-9]{0,8})", size)
            if not found:
                raise ValueError(f"`{size}` in `{text}` is no axis length; write `h=2`")
            lengths[found[1]] = int(found[2])
        if re.search(r"\([^)]*\.\.\.", pattern):
            raise ValueError(f"`{text}` merges `...` with other axes, and nothing leads back")
        axes = [set(re.findall(r"[A-Za-z_]\w*", side)) for side in (left, right)]
        if not arrow or axes[0] != axes[1]:
            raise ValueError(f"`{text}` does not keep its axes: {', '.join(sorted(axes[0] ^ axes[1])) or 'no arrow'}")
        if unknown := set(lengths) - axes[0]:
            raise ValueError(f"`{text}` gives a length to {', '.join(sorted(unknown))}, which it does not have")
        move = cls(left, right, lengths)
        try:
            einops.rearrange(move._probe(), move.pattern, **lengths)
        except einops.EinopsError as error:
            raise ValueError(f"`{text}`: {str(error).strip().splitlines()[-1].strip()}") from error
        return move

    @property
    def pattern(self) -> str:
        """What einops takes."""
        return f"{self.left} -> {self.right}"

    @property
    def rank(self) -> int | None:
        """Of the tensors that it takes, where the text says so."""
        return None if "..." in self.left else len(_tokens(self.left))

    def inverse(self, shape: tuple[int, ...]) -> str:
        """The text that leads back to a tensor of this shape."""
        known = self._axis_lengths(shape)
        return ", ".join([f"{self.right} -> {self.left}", *(f"{axis}={n}" for axis, n in known.items())])

    def _probe(self) -> numpy.ndarray:
        """A small array that fits the left side."""
        import numpy

        shape = []
        for token in _tokens(self.left):
            size = 1
            for axis in token:
                size *= 1 if axis in ("1", "...") else self.lengths.get(axis, 2)
            shape.append(size)
        return numpy.broadcast_to(numpy.int8(0), shape)

    def _axis_lengths(self, shape: tuple[int, ...]) -> dict[str, int]:
        """Every axis' length, read off a shape."""
        tokens, known = _tokens(self.left), dict(self.lengths)
        if ["..."] in tokens:
            cut, behind = tokens.index(["..."]), len(tokens) - tokens.index(["..."]) - 1
            tokens = tokens[:cut] + tokens[cut + 1 :]
            shape = shape[:cut] + shape[len(shape) - behind :]
        for axes, size in zip(tokens, shape, strict=True):
            unknown = [axis for axis in axes if axis != "1" and axis not in known]
            for axis in axes:
                size //= known.get(axis, 1)
            if len(unknown) == 1:
                known[unknown[0]] = size
        return known


def _tokens(side: str) -> list[list[str]]:
    """One list of axes a dimension: `(c h) w` -> [[c, h], [w]]."""
    return [group.strip("()").split() for group in re.findall(r"\([^()]*\)|[^\s()]+", side)]
