from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.ops import IDENTITY, Op, OpError, Pipeline


def counting(*shape: int) -> torch.Tensor:
    """Every element differs from every other, so that no wrong order looks right."""
    return torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)


@pytest.mark.parametrize(
    ("text", "shapes", "expected"),
    [
        ("h w i o -> o i h w", [(2, 3, 4, 5)], lambda x: [x.permute(3, 2, 0, 1)]),
        ("h w c m -> (c m) 1 h w", [(2, 3, 4, 5)], lambda x: [x.reshape(2, 3, 20).permute(2, 0, 1).unsqueeze(1)]),
        (
            "... (c h w) -> ... (w h c), h=2, w=3",
            [(7, 24)],
            lambda x: [x.reshape(7, 4, 2, 3).permute(0, 3, 2, 1).reshape(7, 24)],
        ),
        ("H W -> W H, H=2", [(2, 3)], lambda x: [x.T]),
        ("flip 1", [(2, 3)], lambda x: [x[:, [2, 1, 0]]]),
        ("flip", [(2, 3)], lambda x: [x[[1, 0]]]),
        ("cat", [(2, 3), (4, 3)], lambda x, y: [torch.cat([x, y])]),
        ("cat 1", [(2, 3), (2, 4)], lambda x, y: [torch.cat([x, y], 1)]),
        ("chunk", [(6, 2)], lambda x: [x[:2], x[2:4], x[4:]]),
        ("chunk 1", [(2, 6)], lambda x: [x[:, :2], x[:, 2:4], x[:, 4:]]),
        ("copy", [(2, 3)], lambda x: [x, x]),
        ("split 1 2", [(6, 2)], lambda x: [x[:2], x[2:]]),
        ("i o -> o i | cat 1", [(2, 3), (2, 3)], lambda x, y: [torch.cat([x.T, y.T], 1)]),
        ("zeros 1 | cat", [(2,), (2,)], lambda x, y: [torch.cat([x, torch.zeros(2), y])]),
        ("zeros 2", [(2,), (2,)], lambda x, y: [x, y, torch.zeros(2)]),
        ("each", [(2, 3)], lambda x: [x[0], x[1]]),
        ("each | i o -> o i", [(2, 3, 4)], lambda x: [x[0].T, x[1].T]),
        ("each | cat 1", [(2, 3, 4), (2, 3, 5)], lambda x, y: [torch.cat([x[0], y[0]], 1), torch.cat([x[1], y[1]], 1)]),
        ("flip | each | chunk", [(2, 4)], lambda x: [x[1, :2], x[1, 2:], x[0, :2], x[0, 2:]]),
        ("", [(2, 3), (4,)], lambda x, y: [x, y]),
    ],
)
def test_run_and_shapes(text, shapes, expected):
    sources = [counting(*shape) + 1000 * n for n, shape in enumerate(shapes)]
    wanted = expected(*sources)
    pipeline = Pipeline.parse(text)
    results = pipeline.run(sources, len(wanted))
    assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))
    assert pipeline.shapes(shapes, len(wanted)) == [tuple(w.shape) for w in wanted]
    assert pipeline.text == text
    back = pipeline.invert(shapes, len(wanted)).run(results, len(sources))
    assert all(torch.equal(a, b) for a, b in zip(back, sources, strict=True))


@st.composite
def rearrangements(draw):
    """An einops pattern and a shape that it takes; lengths differ, so that no transposition passes for another."""
    lengths = dict(zip("abcde"[: draw(st.integers(1, 5))], draw(st.permutations([2, 3, 4, 5, 7])), strict=False))

    def side(axes: list[str]) -> list[list[str]]:
        groups: list[list[str]] = []
        for axis in axes:
            if groups and draw(st.booleans()):
                groups[-1].append(axis)
            else:
                groups.append([axis])
        return groups

    def written(groups: list[list[str]]) -> str:
        return " ".join(group[0] if len(group) == 1 else f"({' '.join(group)})" for group in groups)

    left, right = side(draw(st.permutations(list(lengths)))), side(draw(st.permutations(list(lengths))))
    known = [axis for group in left for axis in group[1:]]
    text = ", ".join([f"{written(left)} -> {written(right)}", *(f"{axis}={lengths[axis]}" for axis in known)])
    return text, tuple(math.prod(lengths[axis] for axis in group) for group in left)


@settings(max_examples=60, deadline=None)
@given(rearrangements(), st.sampled_from(["", " | flip", " | flip | cat", " | chunk | cat"]))
def test_inverse_leads_back_bit_for_bit(rearrangement, more):
    text, shape = rearrangement
    pipeline, source = Pipeline.parse(text + more), counting(*shape)
    results = pipeline.run([source])
    assert [tuple(t.shape) for t in results] == pipeline.shapes([shape])
    assert sorted(results[0].flatten().tolist()) == source.flatten().tolist()
    assert torch.equal(pipeline.invert([shape]).run(results)[0], source)


def test_inverse_is_an_op_like_any_other():
    inverse = Op.parse("h w c m -> (c m) 1 h w").invert([(3, 3, 8, 2)])
    assert inverse.text == "(c m) 1 h w -> h w c m, h=3, w=3, c=8, m=2"
    assert Op.parse(inverse.text).rank == 4


@pytest.mark.parametrize(
    ("text", "rank"), [("h w -> w h", 2), ("(a b) 1 -> b a 1, a=2", 2), ("... c -> c ...", None), ("flip", None)]
)
def test_rank(text, rank):
    assert Op.parse(text).rank == rank


def test_sum_does_not_round_and_cannot_be_undone():
    big, one = torch.tensor([2.0**24]), torch.tensor([1.0])
    pipeline = Pipeline.parse("sum")
    assert pipeline.run([big, one, one])[0] == 2**24 + 2  # in float32, 2**24 + 1 is 2**24
    assert pipeline.run([big.half(), one.half()])[0].dtype == torch.float64  # whoever stores it rounds
    assert not pipeline.lossless and Pipeline.parse("flip | i o -> o i").lossless
    with pytest.raises(OpError, match="`sum` has no way back"):
        pipeline.invert([(1,), (1,)])


@pytest.mark.parametrize(
    ("text", "given", "wanted"),
    [
        ("add 9.9e-4", [[1.0, 2.0]], [1.0 + 9.9e-4, 2.0 + 9.9e-4]),
        ("add -9.99E-6", [[1.0, 0.0]], [1.0 - 9.99e-6, -9.99e-6]),
        ("scale .5", [[1.0, -3.0]], [0.5, -1.5]),
        ("sub", [[2.0**24 + 2, 5.0], [1.0, 2.0], [1.0, 3.0]], [2.0**24, 0.0]),
        ("sub", [[2.0]], [2.0]),
        ("sqrt", [[4.0, 0.0]], [2.0, 0.0]),
        ("abs", [[-4.0, 0.5]], [4.0, 0.5]),
    ],
)
def test_ops_calculate_in_float64(text, given, wanted):
    pipeline = Pipeline.parse(text)
    (result,) = pipeline.run([torch.tensor(values) for values in given])
    assert torch.equal(result, torch.tensor(wanted, dtype=torch.float64))
    assert not pipeline.lossless


def test_std_eps_makes_one_standardisation_another():
    kernel = torch.randn(5, 4, 3, 3).double() * torch.logspace(-4, 0, 5).reshape(5, 1, 1, 1)
    (scaled,) = Pipeline.parse("std_eps 1e-5 1e-8").run([kernel])
    variance, mean = torch.var_mean(scaled, (1, 2, 3), correction=0, keepdim=True)
    std, centre = torch.std_mean(kernel, (1, 2, 3), correction=0, keepdim=True)
    wanted = (kernel - centre) / (std + 1e-5)
    torch.testing.assert_close((scaled - mean) / (variance + 1e-8).sqrt(), wanted, rtol=1e-12, atol=1e-12)


def test_without_loses_what_it_leaves_out():
    pipeline, source = Pipeline.parse("split 1 1 1 | without 1"), torch.arange(6)
    assert [part.tolist() for part in pipeline.run([source], 2)] == [[0, 1], [4, 5]]
    assert not pipeline.lossless


def test_a_standardised_kernel():
    kernel = torch.randn(5, 4, 3, 3)
    (found,) = Pipeline.parse("standardize 1e-3").run([kernel])
    variance, mean = torch.var_mean(kernel.double(), (1, 2, 3), correction=0, keepdim=True)
    torch.testing.assert_close(found, (kernel - mean) / (variance + 1e-3).sqrt(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("shapes", "parts"), [([(2, 3)], 3), ([(0, 3)], 1), ([(2, 3), (3, 3)], 2), ([()], 1)])
def test_stacks_that_do_not_fit(shapes, parts):
    with pytest.raises(OpError, match=r"`each \| cat` does not take"):
        Pipeline.parse("each | cat").shapes(shapes, parts)


def test_named_ops():
    pipeline = Pipeline.parse("turn | flip", {"turn": "i o -> o i | flip 1"})
    assert pipeline.text == "i o -> o i | flip 1 | flip"
    assert IDENTITY + pipeline == pipeline == pipeline + IDENTITY


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "transpose",
            "`transpose` is no op; there are cat, chunk, flip, zeros, without, split, copy, abs, sqrt, sub, sum, ",
        ),
        ("cat one", "`cat one`: cat takes the number of an axis or a place, and nothing else"),
        ("flip -1", "`flip -1`: flip takes the number of an axis or a place, and nothing else"),
        ("flip ²", "`flip ²`: flip takes the number of an axis or a place, and nothing else"),
        ("chunk 0 1", "`chunk 0 1`: chunk takes the number of an axis or a place, and nothing else"),
        ("sum 1", "`sum 1`: sum takes nothing"),
        ("copy 2", "`copy 2`: copy takes nothing"),
        ("split", "`split`: split takes the proportions of two or more parts, each from 1 to 9"),
        ("split 0 1", "`split 0 1`: split takes the proportions of two or more parts, each from 1 to 9"),
        ("add", "`add`: add takes one number"),
        ("scale nan", "`scale nan`: scale takes one number"),
        ("std_eps 1e-5", "`std_eps 1e-5`: std_eps takes two numbers"),
        ("h w -> h", "`h w -> h` does not keep its axes: w"),
        ("h -> h w", "`h -> h w` does not keep its axes: w"),
        ("h w -> w h, h", "`h` in `h w -> w h, h` is no axis length; write `h=2`"),
        ("h w -> w h, h=0", "`h=0` in `h w -> w h, h=0` is no axis length; write `h=2`"),
        ("h w -> w h, c=2", "`h w -> w h, c=2` gives a length to c, which it does not have"),
        ("(h w -> w h", "`(h w -> w h`: "),
        ("h h -> h", "`h h -> h`: "),
        ("a ... -> a", "`a ... -> a`: "),
        ("(... c) -> (c ...)", "`(... c) -> (c ...)` merges `...` with other axes, and nothing leads back"),
        ("a 2 -> 2 a", "`a 2 -> 2 a`: "),
    ],
)
def test_invalid_op(text, problem):
    with pytest.raises(ValueError) as caught:
        Pipeline.parse(text)
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shapes", "parts", "problem"),
    [
        ("h w i o -> o i h w", [(2, 3)], 1, "`h w i o -> o i h w` does not take (2, 3): "),
        ("(a b) -> b a, a=2", [(7,)], 1, "`(a b) -> b a, a=2` does not take (7,): "),
        ("flip 2", [(2, 3)], 1, "`flip 2` does not take (2, 3): "),
        ("cat", [(2, 3), (2, 4)], 1, "`cat` does not take (2, 3), (2, 4): "),
        ("chunk", [(4, 2)], 3, "`chunk` does not take (4, 2): an axis of 4 has no 3 equal parts"),
        ("split 1 2", [(4, 2)], 2, "`split 1 2` does not take (4, 2): an axis of 4 has no 3 equal shares"),
        ("chunk", [(4,), (4,)], 2, "`chunk` does not take (4,), (4,): "),
        ("chunk", [()], 2, "`chunk` does not take (): "),
        ("sum", [(2,), (3,)], 1, "`sum` does not take (2,), (3,): "),
        ("zeros 3", [(2,), (2,)], 3, "`zeros 3` does not take (2,), (2,): 2 tensors have no place 3 beside them"),
        ("without 2", [(2,), (2,)], 1, "`without 2` does not take (2,), (2,): 2 tensors have no place 2"),
        ("", [(2,), (3,)], 1, "`no op` gives 2 tensors for 1 names"),
        ("cat", [(2,), (3,)], 2, "`cat` gives 1 tensors for 2 names"),
    ],
)
def test_op_that_does_not_fit(text, shapes, parts, problem):
    for way in (lambda p: p.shapes(shapes, parts), lambda p: p.run([counting(*s) for s in shapes], parts)):
        with pytest.raises(OpError) as caught:
            way(Pipeline.parse(text))
        assert str(caught.value).startswith(problem)
        assert "\n" not in str(caught.value)


def test_cat_never_converts():
    with pytest.raises(OpError, match=r"dtypes differ: torch\.float16, torch\.float32"):
        Pipeline.parse("cat").run([torch.zeros(2), torch.zeros(2, dtype=torch.float16)])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_moving_ops_keep_dtype_and_bits(dtype):
    source = torch.randn(4, 6).to(dtype)
    result = Pipeline.parse("a (b c) -> (c a) b, c=3 | flip").run([source])[0]
    assert result.dtype == dtype
    assert torch.equal(Pipeline.parse("flip | (c a) b -> a (b c), c=3").run([result])[0], source)


@pytest.mark.parametrize("shape", [(0, 2**62, 2**62), (2**70, 2)])
def test_hostile_shapes_are_refused(shape):
    with pytest.raises(OpError, match="no tensor has the shape"):
        Pipeline.parse("flip").shapes([shape])
