"""Sources that may be dropped only while their values are what their place in timm would have."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from converters.dropped import check_dropped, known_values
from converters.emitter import write_tensors
from converters.errors import CheckpointError
from converters.plan import make_plan
from converters.routes import route
from converters.target import Skeleton, build_skeleton, compute_buffers

TABLE = "layers.0.blocks.0.attn.relative_coords_table"


@pytest.fixture(scope="module")
def skeleton() -> Skeleton:
    """Of windows of 8 or 16 pixels nothing but the table tells: the weights have one shape."""
    return replace(build_skeleton("swinv2_tiny_window8_256", {"depths": [1, 1, 1, 1]}), specs={})


def test_zeros(family, checkpoint, tmp_path):
    mapping = family("rules:\n  w: w\ndrop: {k: {reason: no key bias in timm, only: zeros}}")
    skeleton = Skeleton("tiny", {}, checkpoint({"w": torch.ones(2)}).specs, None)
    for bias, problem in (
        (torch.zeros(2), None),
        (torch.tensor([0, 1e-30]), r"source.pth: k: is not zero, and .*: no key bias in timm"),
    ):
        source = checkpoint({"w": torch.ones(2), "k": bias})
        plan = make_plan(mapping, route(mapping, source.specs), skeleton)
        with pytest.raises(CheckpointError, match=problem) if problem else nullcontext():
            write_tensors(plan, source, tmp_path / str(problem is None))
        assert {name: known.tolist() for name, known in known_values(plan, source)} == {"k": [0, 0]}


def test_timms_own_buffer(family, checkpoint, skeleton):
    rows = f"rules:\n  layers: layers\ndrop:\n  '{{*}}': {{reason: timm has its own, only: {TABLE}}}"
    mapping, right = family(rows), compute_buffers(skeleton)[TABLE]
    assert right.shape == (1, 15, 15, 2)
    for given, problem in ((right, None), (right * 1.1, "is not what swinv2_tiny_window8_256 computes for itself: ")):
        source = checkpoint({"table": given})
        plan = make_plan(mapping, route(mapping, source.specs), skeleton)
        with pytest.raises(CheckpointError, match=problem) if problem else nullcontext():
            check_dropped(plan, source)
    (problem,) = make_plan(mapping, route(mapping, checkpoint({"table": torch.ones(1, 31, 31, 2)}).specs), skeleton)
    assert (problem.kind, problem.detail) == ("shape", "1x31x31x2 here, 1x15x15x2 in timm")


def test_parts_of_timms_own_buffer(family, checkpoint, skeleton):
    """Ops lay it out, and each word on the left is one of its parts."""
    rows = f"rules:\n  layers: layers\ndrop:\n  'of_{{y|x}}': {{reason: timm has both in one, only: {TABLE} | chunk 3}}"
    mapping, right = family(rows), compute_buffers(skeleton)[TABLE]
    y, x = right.split(1, dim=3)
    source, crossed = checkpoint({"of_x": x, "of_y": y}), checkpoint({"of_x": y, "of_y": x})
    plan = make_plan(mapping, route(mapping, source.specs), skeleton)
    check_dropped(plan, source)
    assert {name: known.tolist() for name, known in known_values(plan, source)} == {
        "of_x": x.tolist(),
        "of_y": y.tolist(),
    }
    with pytest.raises(CheckpointError, match="of_x: is not what"):
        check_dropped(plan, crossed)
    (problem,) = make_plan(mapping, route(mapping, checkpoint({"of_x": right}).specs), skeleton)
    assert problem.detail == "1x15x15x2 here, 1x15x15x1 in timm"
