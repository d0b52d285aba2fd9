"""Which modules are paired, and what is written of it."""

from __future__ import annotations

import json

import pytest

from converters.errors import MappingError
from converters.verifier.taps import Pair, pair_modules, read_pairs

ENDS = "targets: {resnet18: }\ndetect: ['*']\nleaves: keras\n"


@pytest.fixture
def pairs(plan, specs):
    def find(text: str, sources: str, targets: str, **how: str) -> dict[str, Pair]:
        made = plan(text, sources, targets, **how)
        return {pair.target: pair for pair in pair_modules(made, specs(sources))}

    return find


def test_a_row_pairs_its_module_and_those_that_are_carried(pairs):
    found = pairs(
        "rules:\n  stages.{i}.{j}: layers.{i}.blocks.{j}\n  stages.{i}.{j}.ffn.0: layers.{i}.blocks.{j}.mlp.fc1\n",
        "stages.0.1.attn.qkv.weight=6x2 stages.0.1.attn.bias=2 stages.0.1.ffn.0.weight=4x2",
        "layers.0.blocks.1.attn.qkv.weight=6x2 layers.0.blocks.1.attn.bias=2 layers.0.blocks.1.mlp.fc1.weight=4x2",
    )
    assert {target: (pair.source, pair.line) for target, pair in found.items()} == {
        "layers.0.blocks.1": ("stages.0.1", 5),
        "layers.0.blocks.1.attn": ("stages.0.1.attn", 5),
        "layers.0.blocks.1.attn.qkv": ("stages.0.1.attn.qkv", 5),
        "layers.0.blocks.1.mlp.fc1": ("stages.0.1.ffn.0", 6),
    }


@pytest.mark.parametrize(
    ("rows", "sources", "targets", "found"),
    [
        (  # a stage that ends with what timm's next one begins with
            "'{*}': '{*}'\n  layers.{i}.down: layers.{i+1}.down",
            "layers.0.fc.weight=2 layers.0.down.weight=3 layers.1.fc.weight=2",
            "layers.0.fc.weight=2 layers.1.down.weight=3 layers.1.fc.weight=2",
            {"layers", "layers.0.fc", "layers.1.fc", "layers.1.down"},
        ),
        ("a.{q|k}: b.qk | cat", "a.q.weight=2x2 a.k.weight=2x2", "b.qk.weight=4x2", set()),
        ("a: b.{q|k} | chunk", "a.weight=4x2", "b.q.weight=2x2 b.k.weight=2x2", set()),
        ("a.gamma: b.scale.weight", "a.gamma=2", "b.scale.weight=2", set()),  # a tensor's row is no module's
        ("a: b\n  c.x: b.c", "a.weight=2 c.x.weight=3", "b.weight=2 b.c.weight=3", {"b.c"}),  # b has more than a
    ],
)
def test_modules_that_do_not_hold_the_same_are_no_pair(pairs, rows, sources, targets, found):
    assert set(pairs(f"rules:\n  {rows}\n", sources, targets)) == found


def test_taps_say_where_and_how_the_counterpart_lies(pairs):
    taps = "taps:\n  block_{n}_bn: block_{n}_relu\n  stage: stage | tokens\nops:\n  tokens: b h w c -> b (h w) c\n"
    found = pairs(
        "rules:\n  block_{n}_bn: bn{n}\n  stage: layer\n" + taps,
        "block_3_bn.weight=2 stage.fc.weight=2x2",
        "bn3.weight=2 layer.fc.weight=2x2",
    )
    assert found["bn3"] == Pair("bn3", "block_3_bn", 5, "block_3_relu")
    assert found["layer.fc"].output == "stage.fc" and found["layer.fc"].layout == "b h w c -> b (h w) c"
    text = json.dumps({target: pair.to_json() for target, pair in found.items()})
    assert '"bn3": {"from": "block_3_bn", "line": 5, "output": "block_3_relu"}' in text
    assert {pair.target: pair for pair in read_pairs(json.loads(text))} == found


@pytest.mark.parametrize(
    ("op", "shape", "order"),
    [
        ("flip 1", "3x3x2x4", "flip 1"),  # HWIO to OIHW first: of the same shape behind it
        ("m c h w -> (c m) 1 h w", "3x3x4x1", ""),  # a layout
        ("o i h w -> i o h w", "3x3x4x2", ""),
    ],
)
def test_the_order_is_what_a_row_does_to_a_weight_that_keeps_its_shape(pairs, op, shape, order):
    targets = {"flip 1": "4x2x3x3", "m c h w -> (c m) 1 h w": "4x1x3x3", "o i h w -> i o h w": "4x2x3x3"}
    text = f'rules:\n  conv: conv | mine\nops:\n  mine: "{op}"\n'
    (pair,) = pairs(text, f"conv.kernel={shape}", f"conv.weight={targets[op]}", head=ENDS).values()
    assert pair.order == order


def test_where_taps_say_none_there_is_no_pair(pairs):
    names = "{0}1.weight=2 {0}2.weight=2"
    found = pairs("rules:\n  norm{k}: n{k}\ntaps: {norm2: none}\n", names.format("norm"), names.format("n"))
    assert set(found) == {"n1"}


def test_taps_that_tie_are_told_with_their_lines(pairs):
    with pytest.raises(MappingError, match=r"taps in lines 7 and 8 match a1 alike"):
        pairs("rules:\n  a1: b\ntaps:\n  a{x}: a\n  '*1': a\n", "a1.weight=2", "b.weight=2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("taps: {'**.a': b}", "`**` stands in drop and fill only"),
        ("taps: {'a.{i}': 'b.{j}'}", "{j} is captured nowhere on the left"),
        ("taps: {a: 'b | tokens'}", "`tokens` is no op"),
        ("deviation: [{where: '**.norm', attribute: eps, source: 1e-6, target: 1e-5, bound: 2, reason: r}]", "bound"),
        (
            "deviation: [{where: 'a**', attribute: eps, source: 1, target: 1, bound: 0.1, reason: r}]",
            "more than one way",
        ),
    ],
)
def test_faults_in_the_table_name_their_line(family, text, words):
    with pytest.raises(MappingError) as caught:
        family(f"rules: {{}}\n{text}\n")
    assert words in str(caught.value) and ":5" in str(caught.value)
