"""The op language: what happens to tensors between their source and their target.

An op takes a list of tensors and gives a list. It is written as one of

    h w i o -> o i h w              an einops pattern: elements move, none is computed
    ... (c h w) -> ... (w h c), h=2, w=2
    cat                             several tensors become one, along the first axis (`cat 1`: the second)
    chunk                           one becomes as many as there are names for, in equal parts
    split 1 2                       as `chunk`, in parts of these proportions (q from k and v)
    copy                            one becomes as many as there are names for, all alike
    flip 1                          an axis reversed (BGR to RGB)
    zeros 1                         a tensor of zeros beside the others, at place 1, like the first (a missing key bias)
    each                            every tensor is a stack along its first axis, and what follows is for each layer
    without 1                       the tensor at place 1 is left out (a key bias that softmax does not see)
    sum                             several tensors of one shape are added
    sub                             the others are subtracted from the first
    abs                             every element's magnitude
    sqrt                            the square root of every element
    add 9.9e-4                      a constant is added: `running_var | add 9.9e-4` makes up for another eps
    scale 0.5                       every element is multiplied
    standardize 1e-10               a kernel, by output channels (axis 0), loses its mean and is divided by the root of
                                    its variance + 1e-10: what a weight-standardised convolution makes of it
    std_eps 1e-5 1e-8               a kernel, by output channels (axis 0), is scaled so that to divide it by the root of
                                    its variance + 1e-8 is to divide it, as it came, by its standard deviation + 1e-5

and ops in a row are separated by `|`. Those up to `each` only move elements and derive their own inverse; those
behind `without` calculate, and leave float64 for whoever stores it to round once. An op has no face for shapes of
its own: on torch's meta device it computes them, so a plan checks whole chains before a byte is read.

>>> import torch
>>> [t.shape for t in Pipeline.parse("cat | (n d) i -> n d i, n=3").run([torch.empty(4, 5)] * 3)]
[torch.Size([3, 4, 5])]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

from converters.calculations import add, difference, magnitude, root, scale, standardize, std_eps, total
from converters.rearrangements import Rearrangement

if TYPE_CHECKING:
    import torch

__all__ = ["IDENTITY", "Op", "OpError", "Pipeline", "Tensors"]

Tensors = list["torch.Tensor"]


class OpError(Exception):
    """An op does not fit the tensors that it was given; the text names the op, the shapes and why."""


@dataclass(frozen=True)
class Op:
    """One step of a pipeline.

    `run(tensors, parts)` gives the new tensors; `parts` is how many the pipeline must end with.
    `invert(shapes)` gives the op that undoes it, given the shapes that went in; None where elements are
    computed and the way back is lost.
    """

    text: str
    run: Callable[[Tensors, int], Tensors] = field(compare=False)
    invert: Callable[[list[tuple[int, ...]]], Op] | None = field(compare=False)
    rank: int | None = None  # the rank that it takes, where its text says so

    @classmethod
    @lru_cache(maxsize=1024)
    def parse(cls, text: str) -> Op:
        """Raises ValueError with what is wrong about `text`."""
        if "->" in text:
            return _rearrange(text)
        word, *rest = text.split()
        if word in _MOVING and len(rest) <= 1 and all(re.fullmatch("[0-9]", part) for part in rest):
            return _MOVING[word](text, int(rest[0]) if rest else 0)
        if word == "split" and len(rest) > 1 and all(re.fullmatch("[1-9]", part) for part in rest):
            return _share(text, [int(part) for part in rest])
        if word == "copy" and not rest:
            return _COPY
        if word in _GATHERING and not rest:
            return _calculating(text, _GATHERING[word])
        if len(rest) == _CONSTANTS.get(word) and all(re.fullmatch(_NUMBER, part) for part in rest):
            return _calculating(text, lambda tensors: _CONSTANT[word](tensors, *map(float, rest)))
        for words, takes in (
            (_MOVING, "the number of an axis or a place, and nothing else"),
            ((*_GATHERING, "copy"), "nothing"),
            (("split",), "the proportions of two or more parts, each from 1 to 9"),
            (_CONSTANT, "two numbers" if _CONSTANTS.get(word) == 2 else "one number"),
        ):
            if word in words:
                raise ValueError(f"`{text}`: {word} takes {takes}")
        there = ", ".join([*_MOVING, "split", "copy", *_GATHERING, *_CONSTANT])
        raise ValueError(f"`{text}` is no op; there are {there}, einops patterns, and the entries of `ops:`")


@dataclass(frozen=True)
class Pipeline:
    """Ops in a row.

    >>> Pipeline.parse("h w i o -> o i h w | flip 1").text
    'h w i o -> o i h w | flip 1'
    """

    ops: tuple[Op, ...] = ()

    @classmethod
    def parse(cls, text: str, named: Mapping[str, str] | None = None) -> Pipeline:
        """Ops from their text; `named` are a mapping's own. Raises ValueError."""
        ops: list[Op] = []
        parts = [piece.strip() for piece in text.split("|") if piece.strip()]
        for place, part in enumerate(parts):
            if part == "each":
                return cls(tuple(ops)) + cls.parse("|".join(parts[place + 1 :]), named).each()
            ops.extend(cls.parse(named[part]).ops if named and part in named else [Op.parse(part)])
        return cls(tuple(ops))

    def __add__(self, other: Pipeline) -> Pipeline:
        return Pipeline(self.ops + other.ops) if other.ops else self

    def each(self) -> Pipeline:
        """These ops for each layer of stacks."""
        return Pipeline((_each(self),))

    @property
    def text(self) -> str:
        return " | ".join(op.text for op in self.ops)

    @property
    def lossless(self) -> bool:
        """Whether every op can be undone."""
        return all(op.invert for op in self.ops)

    def run(self, tensors: Sequence[torch.Tensor], parts: int = 1) -> Tensors:
        """The tensors after every op. Raises OpError, with the op's own text."""
        current = list(tensors)
        for op in self.ops:
            try:
                current = op.run(current, parts)
            except Exception as error:  # einops and torch raise many kinds
                shapes = ", ".join(str(tuple(t.shape)) for t in current)
                reason = str(error).strip().splitlines()[-1].strip()
                raise OpError(f"`{op.text}` does not take {shapes}: {reason}") from error
        if len(current) != parts:
            raise OpError(f"`{self.text or 'no op'}` gives {len(current)} tensors for {parts} names")
        return current

    def shapes(self, shapes: Sequence[tuple[int, ...]], parts: int = 1) -> list[tuple[int, ...]]:
        """The shapes after every op, with no data. Raises OpError."""
        if not self.ops and len(shapes) == parts:
            return list(shapes)
        return list(_shapes(self, tuple(shapes), parts))

    def invert(self, shapes: Sequence[tuple[int, ...]], parts: int = 1) -> Pipeline:
        """The pipeline that leads back from tensors of these shapes. Raises OpError if an op is lossy."""
        inverses, current = [], list(shapes)
        for op in self.ops:
            if op.invert is None:
                raise OpError(f"`{op.text}` has no way back")
            inverses.append(op.invert(current))
            current = [tuple(t.shape) for t in op.run(_meta(tuple(current)), parts)]
        return Pipeline(tuple(reversed(inverses)))


IDENTITY = Pipeline()


@lru_cache(maxsize=1 << 14)
def _shapes(pipeline: Pipeline, shapes: tuple[tuple[int, ...], ...], parts: int) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(t.shape) for t in pipeline.run(_meta(shapes), parts))


def _meta(shapes: tuple[tuple[int, ...], ...]) -> Tensors:
    import torch

    try:
        return [torch.empty(shape, device="meta") for shape in shapes]
    except (RuntimeError, TypeError) as error:  # strides or sizes beyond 64 bits
        raise OpError(f"no tensor has the shape {', '.join(map(str, shapes))}") from error


def _rearrange(text: str) -> Op:
    """An einops pattern with its axis lengths: `... (c h) -> ... (h c), h=2`."""
    import einops

    move = Rearrangement.parse(text)

    def run(tensors: Tensors, parts: int) -> Tensors:
        return [einops.rearrange(tensor, move.pattern, **move.lengths) for tensor in tensors]

    return Op(text, run, lambda shapes: _rearrange(move.inverse(shapes[0])), move.rank)


def _cat(text: str, axis: int) -> Op:
    def run(tensors: Tensors, parts: int) -> Tensors:
        import torch

        if len({t.dtype for t in tensors}) > 1:
            raise ValueError(f"dtypes differ: {', '.join(sorted({str(t.dtype) for t in tensors}))}")
        return [torch.cat(tensors, dim=axis)]

    def invert(shapes: list[tuple[int, ...]]) -> Op:
        return _split(axis, [shape[axis] for shape in shapes])

    return Op(text, run, invert)


def _split(axis: int, sizes: list[int]) -> Op:
    return Op(
        f"split {axis} {sizes}",
        lambda tensors, parts: list(tensors[0].split(sizes, dim=axis)),
        lambda shapes: _cat(f"cat {axis}", axis),
    )


def _chunk(text: str, axis: int) -> Op:
    def run(tensors: Tensors, parts: int) -> Tensors:
        (tensor,) = tensors
        if tensor.shape[axis] % parts:
            raise ValueError(f"an axis of {tensor.shape[axis]} has no {parts} equal parts")
        return list(tensor.chunk(parts, dim=axis))

    return Op(text, run, lambda shapes: _cat(f"cat {axis}", axis))


def _share(text: str, shares: list[int]) -> Op:
    def run(tensors: Tensors, parts: int) -> Tensors:
        (tensor,) = tensors
        unit, rest = divmod(len(tensor), sum(shares))
        if rest:
            raise ValueError(f"an axis of {len(tensor)} has no {sum(shares)} equal shares")
        return list(tensor.split([share * unit for share in shares]))

    return Op(text, run, lambda shapes: _cat("cat", 0))


def _flip(text: str, axis: int) -> Op:
    return Op(text, lambda tensors, parts: [t.flip(axis) for t in tensors], lambda shapes: _flip(text, axis))


def _zeros(text: str, place: int) -> Op:
    def run(tensors: Tensors, parts: int) -> Tensors:
        if place > len(tensors):
            raise ValueError(f"{len(tensors)} tensors have no place {place} beside them")
        return [*tensors[:place], tensors[0].new_zeros(tensors[0].shape), *tensors[place:]]

    return Op(text, run, lambda shapes: _without(f"without {place}", place))


def _without(text: str, place: int) -> Op:
    def run(tensors: Tensors, parts: int) -> Tensors:
        if place >= len(tensors):
            raise ValueError(f"{len(tensors)} tensors have no place {place}")
        return [*tensors[:place], *tensors[place + 1 :]]

    return Op(text, run, None)


def _each(layer: Pipeline) -> Op:
    """What a pipeline does, done to the layers of stacks; the results of the first layer come first."""

    def run(tensors: Tensors, parts: int) -> Tensors:
        layers = list(zip(*(tensor.unbind() for tensor in tensors), strict=True))
        if not layers or parts % len(layers):
            raise ValueError(f"{len(layers)} layers give no {parts} names")
        return [one for given in layers for one in layer.run(given, parts // len(layers))]

    def invert(shapes: list[tuple[int, ...]]) -> Op:
        return _stack(layer, shapes)

    return Op(" | ".join(filter(None, ["each", layer.text])), run, invert if layer.lossless else None)


def _stack(layer: Pipeline, shapes: list[tuple[int, ...]]) -> Op:
    def run(tensors: Tensors, parts: int) -> Tensors:
        import torch

        count = len(tensors) // shapes[0][0]
        back = layer.invert([shape[1:] for shape in shapes], count)
        layers = [back.run(tensors[at : at + count], parts) for at in range(0, len(tensors), count)]
        return [torch.stack(column) for column in zip(*layers, strict=True)]

    return Op("stack", run, lambda _: _each(layer))


_FIRST: Op = Op("first", lambda tensors, parts: tensors[:1], lambda shapes: _COPY)
_COPY: Op = Op("copy", lambda tensors, parts: tensors * parts, lambda shapes: _FIRST)


def _calculating(text: str, function: Callable[[Tensors], Tensors]) -> Op:
    """An op that computes elements, in float64; rounding is for whoever stores them."""

    def run(tensors: Tensors, parts: int) -> Tensors:
        return function([tensor.double() for tensor in tensors])

    return Op(text, run, None)


_NUMBER = r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"
_MOVING: dict[str, Callable[[str, int], Op]] = {
    "cat": _cat,
    "chunk": _chunk,
    "flip": _flip,
    "zeros": _zeros,
    "without": _without,
}
_GATHERING: dict[str, Callable[[Tensors], Tensors]] = {"abs": magnitude, "sqrt": root, "sub": difference, "sum": total}
_CONSTANT: dict[str, Callable[..., Tensors]] = {
    "add": add,
    "scale": scale,
    "standardize": standardize,
    "std_eps": std_eps,
}
_CONSTANTS = {"add": 1, "scale": 1, "standardize": 1, "std_eps": 2}  # how many each takes
