from __future__ import annotations

import time
from collections import Counter
from fnmatch import fnmatchcase

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from converters.folding import fold
from converters.names import Pattern, Template, prefixes, split


@pytest.mark.parametrize(
    ("pattern", "name", "captures", "rest"),
    [
        ("stages.{i}.blocks.{j}", "stages.1.blocks.12.norm.bias", {"i": 1, "j": 12}, "norm.bias"),
        ("stages.{i}", "stages.1", {"i": 1}, ""),
        ("stages.{i}", "stages.one.weight", None, ""),
        ("stages.{i}", "stages", None, ""),
        ("conv2d_{n}", "conv2d_17/kernel", {"n": 17}, "kernel"),
        ("conv2d_{n}", "conv2d_/kernel", None, ""),
        ("head", "header.weight", None, ""),
        ("*_head", "roi_head.fc.weight", {}, "fc.weight"),
        ("a*c", "a.c", None, ""),
        ("a.c", "axc", None, ""),
        ("{*}.proj", "k.proj.bias", {"*": "k"}, "bias"),
        ("a/{i}.b", "a.7/b/c", {"i": 7}, "c"),
        ("neck.**", "neck.convs.0.weight", {}, "convs.0.weight"),
        ("**.attn.{i}", "x.y.attn.3.bias", {"i": 3}, "bias"),
        ("**", "a.b", {}, "a.b"),
        ("layer{i}x{j}", "layer12x5", {"i": 12, "j": 5}, ""),
        ("layer{i}", "layer007", {"i": 7}, ""),
        ("layer{i}", "layer1234567890", None, ""),
        ("layer{i}", "layer٣", None, ""),
    ],
)
def test_match(pattern, name, captures, rest):
    found = Pattern.parse(pattern).match(split(name))
    assert (found and found.captures) == captures
    if found:
        assert found.rest == (split(rest) if rest else ())


def test_gather_knows_which_word():
    gather = Pattern.parse("attn.{query|key|value}.{i}")
    assert [gather.match(split(f"attn.{word}.0.bias")).choice for word in gather.choices] == [0, 1, 2]
    assert gather.match(split("attn.que.0")) is None


def test_a_gather_across_modules():
    gather = Pattern.parse("b{i}.{bn/mean|conv.bias|x}")
    found = [gather.match(split(f"b3.{name}")) for name in ("bn.mean", "conv/bias", "x.y", "bn.bias")]
    assert [match and (match.choice, match.captures, match.rest) for match in found] == [
        (0, {"i": 3}, ()),
        (1, {"i": 3}, ()),
        (2, {"i": 3}, ("y",)),
        None,
    ]
    assert gather.choices == ("bn/mean", "conv.bias", "x") and gather.fields == {"i"}
    assert Pattern.parse("{a|ab}").match(("ab",)).choice == 1


def test_whole_segments_are_captured():
    pattern = Pattern.parse("{**}.conv")
    assert pattern.match(split("a.0.conv.weight")).captures == {"**": "a.0"} and pattern.fields == {"**"}
    assert pattern.match(("conv",)).captures == {"**": ""} and pattern.match(("a",)) is None
    assert Template.parse("{**}.bn").render({"**": "a.0"}) == ("a.0.bn",)


def test_table():
    pattern = Pattern.parse("{l}.{i}", {"l": {"conv": "conv1", "conv_long": 2}, "unused": {"a": 1}})
    assert pattern.match(split("conv_long.5")).captures == {"l": 2, "i": 5}
    assert pattern.match(split("conv.5")).captures == {"l": "conv1", "i": 5}
    assert pattern.match(split("conv_.5")) is None


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a.{i", "`{i` has a brace without its partner"),
        ("a.i}", "`a.i}` has a brace without its partner"),
        ("a.{i+1}", "`{i+1}` is no capture; arithmetic belongs on the right side"),
        ("a.{0.__class__}", "`{0.__class__}` is no capture; arithmetic belongs on the right side"),
        ("a.{}", "`{}` is no capture; arithmetic belongs on the right side"),
        ("a.{_any}", "`{_any}` is no capture; arithmetic belongs on the right side"),
        ("{i}.{i}", "`{i}.{i}` captures {i} twice"),
        ("{*}.{*}", "`{*}.{*}` captures {*} twice"),
        ("{**}.a.{**}", "`{**}.a.{**}` captures {**} twice"),
        ("{q|k}.{q|k}", "`{q|k}.{q|k}` gathers twice"),
        ("{q|q}", "`{q|q}` must name different words, each within one segment"),
        ("{a.q|a.q}", "`{a.q|a.q}` must name different words"),
        ("{a.q|b}.{c|d}", "`{a.q|b}.{c|d}` gathers twice"),
        ("x{i}{j}", "`x{i}{j}` can be read in more than one way; put text between its wildcards"),
        ("*{i}", "`*{i}` can be read in more than one way; put text between its wildcards"),
        ("{*}*", "`{*}*` can be read in more than one way; put text between its wildcards"),
        ("a*b*c*d", "`a*b*c*d` can be read in more than one way; put text between its wildcards"),
        ("", "`` has a segment without text"),
        ("neck.", "`neck.` has a segment without text"),
        ("a//b", "`a//b` has a segment without text"),
    ],
)
def test_invalid_pattern(text, problem):
    with pytest.raises(ValueError) as caught:
        Pattern.parse(text)
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("template", "captures", "names"),
    [
        ("layers.{i+1}", {"i": 0}, ["layers.1"]),
        ("{2*i+j//3-1}.{j%3}", {"i": 4, "j": 7}, ["9.1"]),
        ("{(i+1)*2}", {"i": 1}, ["4"]),
        ("{*}.fc", {"*": "head"}, ["head.fc"]),
        ("{l}", {"l": "conv1"}, ["conv1"]),
        ("a.{k|v}", {}, ["a.k", "a.v"]),
        ("{a|b}.{i}.{k|v}", {"i": 0}, ["a.0.k", "a.0.v", "b.0.k", "b.0.v"]),
        ("x{|_1}", {}, ["x", "x_1"]),
    ],
)
def test_render(template, captures, names):
    assert list(Template.parse(template).render(captures)) == names


@pytest.mark.parametrize(
    "text", ["i.j", "i[0]", "f(i)", "__import__('os')", "'x'", "i**9", "-i", "True", "i if i else 0"]
)
def test_template_is_no_python(text):
    with pytest.raises(ValueError) as caught:
        Template.parse(f"a.{{{text}}}")
    assert str(caught.value) == f"`{{{text}}}` is no expression of captures, whole numbers and + - * // %"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{i" + "+1" * 60 + "}", "is no expression"),
        ("{" + "(" * 90 + "}", "is no expression"),
        ("{i+}", "is no expression"),
        ("{}", "is no expression"),
        ("a.}", "has a brace without its partner"),
        ("head.*", "a bare `*` has no meaning on the right side; capture it as {*}"),
        ("a.**", "a bare `*` has no meaning on the right side"),
        ("{k|k}", "must name different words"),
    ],
)
def test_invalid_template(text, problem):
    with pytest.raises(ValueError, match=problem.replace("*", r"\*").replace("{", r"\{")):
        Template.parse(text)


@pytest.mark.parametrize(
    ("text", "problem"),
    [("{i//0}", "`i // 0` divides by zero"), ("{i%j}", "`i % j` divides by zero"), ("{l+1}", "`conv` is no number")],
)
def test_arithmetic_that_fails(text, problem):
    with pytest.raises(ValueError, match=problem):
        Template.parse(text).render({"i": 1, "j": 0, "l": "conv"})


def test_template_names_what_it_needs():
    template = Template.parse("a.{i+1}.{*}.{q|k}.{j*s}")
    assert template.fields == {"i", "j", "s", "*"}
    with pytest.raises(KeyError):
        template.render({"i": 1, "*": "x", "j": 2})


WORDS = st.text("abx_-", min_size=1, max_size=4)
SEGMENTS = st.lists(st.one_of(WORDS, st.integers(0, 10**9 - 1)), min_size=1, max_size=6)


@given(SEGMENTS, st.data())
def test_identity_mapping_reproduces_names(segments, data):
    captured = [isinstance(part, int) and data.draw(st.booleans()) for part in segments]
    text = ".".join(f"{{v{n}}}" if capture else str(segments[n]) for n, capture in enumerate(captured))
    name = ".".join(map(str, segments))
    found = Pattern.parse(text).match(split(name))
    assert Template.parse(text).render(found.captures) == (name,)
    assert found.rest == ()


def shortest(pattern: list[str], name: tuple[str, ...]) -> int | None:
    """By definition: the least number of leading segments that the whole pattern matches."""

    def whole(pattern: list[str], part: tuple[str, ...]) -> bool:
        if not pattern:
            return not part
        if pattern[0] == "**":
            return any(whole(pattern[1:], part[end:]) for end in range(len(part) + 1))
        return bool(part) and fnmatchcase(part[0], pattern[0]) and whole(pattern[1:], part[1:])

    return next((end for end in range(len(name) + 1) if whole(pattern, name[:end])), None)


@example(["a", "**", "**"], ("a",))
@given(
    st.lists(st.sampled_from(["a", "b", "*", "a*", "**"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(["a", "b", "ab"]), min_size=1, max_size=7).map(tuple),
)
def test_two_stars_match_by_definition(pattern, name):
    found = Pattern.parse(".".join(pattern)).match(name)
    assert (found and len(name) - len(found.rest)) == shortest(pattern, name)


def test_hostile_patterns_and_names_take_no_time():
    start = time.perf_counter()
    assert Pattern.parse("**.a." * 30 + "b").match(("a",) * 300) is None
    assert Pattern.parse("*a*b").match(("a" * 5000,)) is None
    assert Pattern.parse("x{i}y{j}z{k}w").match(("x1y1z" + "1" * 5000,)) is None
    assert time.perf_counter() - start < 2


NAMES = st.lists(st.text("ab01._{}", min_size=1, max_size=8), unique=True, max_size=30)


@given(NAMES)
@example(["x0.w", "x1.w", "x{0..1}.w"])
def test_fold_counts_every_name(names):
    assert sum(count for _, count in fold(names)) == len(names)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["weight", "bias", "gamma"])), unique=True, min_size=1))
def test_fold_of_a_grid(parts):
    by_leaf = Counter(leaf for _, leaf in parts)
    folded = fold(f"block{i}.norm.{leaf}" for i, leaf in parts)
    assert sum(count for _, count in folded) == sum(by_leaf.values())
    assert all(any(leaf in text for text, _ in folded) for leaf in by_leaf)


def test_fold():
    grid = [f"stages.{i}.blocks.{j}.{leaf}" for i in range(4) for j in range(6) for leaf in ("weight", "bias")]
    assert fold(grid) == [("stages.{0..3}.blocks.{0..5}.{weight,bias}", 48)]
    assert fold(["cls_token", "a/b1/kernel", "a/b3/kernel", "fc0"]) == [
        ("cls_token", 1),
        ("a/b{1..3}/kernel", 2),
        ("fc0", 1),
    ]
    assert fold(["a/b1/kernel", "a/b1/bias", "a/b2/kernel", "a/b2/bias"]) == [("a/b{1..2}/{kernel,bias}", 4)]
    assert fold(["stages.1.00.weight", "unit01/a", "unit12/a"]) == [("stages.1.00.weight", 1), ("unit{01..12}/a", 2)]
    assert fold([]) == []


def test_prefixes():
    assert prefixes([split("a.b.c"), split("a/d")]) == {("a",), ("a", "b"), ("a", "b", "c"), ("a", "d")}


def test_a_hostile_name_has_few_prefixes():
    assert len(prefixes([("a",) * 100_000])) == 64
