from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from converters.detection import find_plan
from converters.diagnosis import KINDS, cures, diagnose
from converters.errors import PlanError
from converters.mapping import find_mappings
from converters.readers import Checkpoint
from converters.tensors import LazyTensor, TensorSpec

SPECS = Path(__file__).parent / "plans"


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Any]:
    """Plan a family's real source with a mapping that lacks some rows, and has others."""

    def edit(family: str, source: str, missing: str, *rows: str) -> Any:
        lines = find_mappings()[family].read_text("utf-8").splitlines()
        kept = [line for line in lines if not re.match(rf" +\W?({missing})", line)]
        where = next(n for n, line in enumerate(kept) if line.startswith("rules:")) + 1
        path = tmp_path / "mine.yaml"
        path.write_text("\n".join([*kept[:where], *(f"  {row}" for row in rows), *kept[where:]]), "utf-8")
        found = json.loads((SPECS / f"{family}.specs.json").read_text())[source]
        return find_plan(_checkpoint(found), family=str(path))

    return edit


def _checkpoint(source: dict[str, Any]) -> Checkpoint:
    specs = {
        name: TensorSpec(name, tuple(shape), *(more or ["float32"]))
        for name, (shape, *more) in source["tensors"].items()
    }
    tensors = {name: LazyTensor(spec, lambda: memoryview(b"")) for name, spec in specs.items()}
    return Checkpoint(Path("source.pth"), "specs", tensors, metadata=source["metadata"])


def test_the_whole_text(edited, tmp_path):
    with pytest.raises(PlanError) as caught:
        edited("mmlab/swin", "an MMDetection backbone", r"stages\.\{i\}\.blocks\.\{j\}\.ffn\.layers\.1:")
    assert (
        str(caught.value)
        == f"""\
source.pth: {tmp_path}/mine.yaml does not close on swin_tiny_patch4_window7_224 (48 problems)
  24 sources lead nowhere:       backbone.stages.{{0..3}}.blocks.{{0..5}}.ffn.layers.1.{{weight,bias}}
     line 18  stages.{{i}}.blocks.{{j}}: layers.{{i}}.blocks.{{j}}       the target has no \
layers.{{0..3}}.blocks.{{0..5}}.ffn.layers.1.{{weight,bias}}
  24 targets have no origin:     layers.{{0..3}}.blocks.{{0..5}}.mlp.fc2.{{weight,bias}}
  try      stages.{{i}}.blocks.{{j}}.ffn.layers.1: layers.{{i}}.blocks.{{j}}.mlp.fc2      (same indices, same shapes; its ops are yours to check)"""  # noqa: E501
    )


@pytest.mark.parametrize(
    ("family", "source", "missing", "offered"),
    [
        (
            "mmlab/swin",
            "an MMDetection backbone",
            r"stages.*\.ffn",
            [
                "stages.{i}.blocks.{j}.ffn.layers.0.0: layers.{i}.blocks.{j}.mlp.fc1",
                "stages.{i}.blocks.{j}.ffn.layers.1: layers.{i}.blocks.{j}.mlp.fc2",
            ],
        ),
        (
            "mmlab/swin",
            "an MMDetection backbone",
            r"stages\.\{i\}\.downsample|patch_embed\.proj",
            [
                "patch_embed.projection: patch_embed.proj",
                "stages.{i}.downsample.norm: layers.{i+1}.downsample.norm",
                "stages.{i}.downsample.reduction: layers.{i+1}.downsample.reduction",
            ],
        ),
        (
            "mmlab/swin",
            "an MMPretrain classifier",
            r"stages\.\{i\}\.blocks\.\{j\}:",
            ["stages.{i}.blocks.{j}.norm{k}: layers.{i}.blocks.{j}.norm{k}"],
        ),
        ("keras/mobilenet_v2", "no top", "Conv1:", ["Conv1: conv_stem"]),
    ],
)
def test_an_offered_row_closes_the_plan(edited, family, source, missing, offered):
    with pytest.raises(PlanError) as caught:
        edited(family, source, missing)
    rows = re.findall(r"^  try +(.*?) +\(same indices, same shapes.*\)$", str(caught.value), re.MULTILINE)
    assert rows == offered
    assert edited(family, source, missing, *rows).steps


@pytest.mark.parametrize(
    ("sources", "targets", "offered"),
    [
        ("a.0.w=3 a.1.w=3", "b.0.w=3 b.1.w=3", [("a.{i}", "b.{i}")]),
        ("a.0.w=3 a.1.w=3", "b.2.w=3 b.3.w=3", [("a.{i}", "b.{i+2}")]),
        ("a.4.w=3 a.5.w=3", "b.1.w=3 b.2.w=3", [("a.{i}", "b.{i-3}")]),
        ("a.1.w=3 a.4.w=3", "b.2.w=3 b.5.w=3", [("a.{i}", "b.{i+1}")]),
        ("a1.w=3 a2.w=3", "b0.w=3 b1.w=3", [("a{i}", "b{i-1}")]),
        ("a.0.w=3", "b.5.w=3", [("a.0", "b.5")]),
        ("a.0.0.w=3 a.0.1.w=3", "b.7.1.w=3 b.7.2.w=3", [("a.0.{i}", "b.7.{i+1}")]),
        ("a.w=3 a.v=4", "b.w=3 b.v=4", [("a", "b")]),
        ("a/kernel=2x3 a/bias=3", "b.weight=3x2 b.bias=3", [("a", "b")]),
        # no cure is better than a wrong one
        ("a.w=3 c.w=3", "b.w=3 d.w=3", []),
        ("a.w=3", "b.w=3 d.w=3", []),
        ("a.w=3 c.w=3", "b.w=3", []),
        ("a.w=3", "b.w=4", []),
        ("a.w=3", "b.v=3", []),
        ("a.w=3 a.v=3", "b.w=3", []),
        ("a.0.w=3 a.1.w=3", "b.0.w=3 b.1.w=3 b.2.w=3", []),
        ("a.0.w=3 a.2.w=3", "b.0.w=3 b.1.w=3", []),
        ("a.0.w=3 a.1.w=4", "b.0.w=4 b.1.w=3", []),
        ("a.0.w=3 a.1.w=3", "b.0.0.w=3 b.0.1.w=3 c.0.w=3 c.1.w=3", []),
    ],
)
def test_cures(plan, family, sources, targets, offered):
    head = "targets: {resnet18: }\ndetect: [a]\nleaves: keras\n"
    problems = plan("rules: {z: z}", sources, targets, head)
    assert cures(family("rules: {z: z}", head), problems) == offered


EVERY_KIND = """\
strip: m.
rules:
  a: x
  b: x
  c: y
  d: z
  g.{i}: t
  g.{j}: u
  '{q|k}': qk | cat
  o: o | h w -> w h
  i: i
fill: {n: 0}
"""


def test_every_kind_is_said_once_with_its_rows(plan, family):
    sources = "a.w=1 m.a.w=1 b.w=1 c.w=2 d.w=1 e.w=1 g.1.w=1 q.w=1 o.w=2x3x4 i.w=1:int64"
    targets = "x.w=1 y.w=3 u.w=1 qk.w=2 o.w=2 i.w=1"
    problems = plan(EVERY_KIND, sources, targets)
    assert {problem.kind for problem in problems} == set(KINDS)
    text = str(diagnose(family(EVERY_KIND), "tiny", problems))
    assert [line.rstrip() for line in text.splitlines()[1:]] == [
        "  1 source has no row and no drop: e.w",
        "  1 source leads nowhere:        d.w",
        "     line 9  d: z                                               the target has no z.w",
        "  1 name has rows that tie:      g.1.w",
        "     line 10  g.{i}: t",
        "     line 11  g.{j}: u",
        "  1 source is there twice:       m.a.w",
        "     it and a.w are one name without their prefix",
        "  1 source leads where another leads: b.w",
        "     line 6  a: x                                               x.w comes from a.w too",
        "     line 7  b: x                                               x.w comes from a.w too",
        "  1 target lacks a part:         qk.w",
        "     line 12  {q|k}: qk                                          the source has no k",
        "  1 target's op does not fit:    o.w",
        "     line 13  o: o                                               `h w -> w h` does not take (2, 3, 4): "
        "Wrong shape: expected 2 dims. Received 3-dim tensor.",
        "  1 target has another shape:    y.w",
        "     line 8  c: y                                               2 from c.w, 3 in timm",
        "  1 target has another kind of dtype: i.w",
        "     line 14  i: i                                               int64 from i.w, float32 in timm",
        "  1 target has no origin:        u.w",
    ]


def test_names_are_printable(plan, family):
    problems = plan("rules: {z: z}", "\x1b[31mred.w=1 z.\x1b[32m=1 m.\u202e=1", "x.w=1")
    text = str(diagnose(family("rules: {z: z}"), "tiny", problems))
    assert r"\x1b[31mred.w" in text and r"the target has no z.\x1b[32m" in text and r"m.\u202e" in text
    assert text.replace("\n", "").isprintable()


def test_a_long_text_is_cut_but_keeps_its_cures(plan, family):
    sources = " ".join(f"s{chr(97 + n % 26)}{chr(97 + n // 26)}.w=1" for n in range(300))
    problems = plan("rules: {z: z}", f"{sources} a.w=7", "b.w=7")
    lines = str(diagnose(family("rules: {z: z}"), "tiny", problems)).splitlines()
    assert len(lines) == 62
    assert lines[-2:] == [
        "  ... and 243 lines more; is this the right family?",
        "  try      a: b      (same indices, same shapes)",
    ]


def test_a_family_that_ships_is_named_as_such():
    source = _checkpoint({"tensors": {"stem.weight": [[1]]}, "metadata": {}})
    with pytest.raises(
        PlanError, match=r"^source.pth: mappings/mmlab/swin\.yaml does not close on swin_tiny_patch4_window7_224 \("
    ):
        find_plan(source, family="mmlab/swin")
