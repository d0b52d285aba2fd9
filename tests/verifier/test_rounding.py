"""Weights in a narrower dtype: rounded once, to the bit, and the function compared without the rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.conversion import convert
from converters.readers import open_checkpoint
from converters.verifier import verify
from converters.verifier.rounding import nearest, unrounded
from converters.verifier.subject import read_subject

EDGES = [0.0, -0.0, np.inf, -np.inf, 65504.0, 65519.99, 65520.0, -65520.0, 6e-8, 2.9e-8, 2.99e-8, 1e-45, 3.39e38]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_oracle_agrees_with_torch_where_that_rounds_once(dtype):
    rng = np.random.default_rng(0)
    values = np.ldexp(rng.standard_normal(200_000), rng.integers(-30, 18, 200_000)).astype(np.float32)
    ties = np.concatenate([1 + np.arange(2**10) * 2.0**-11, -1 - np.arange(2**8) * 2.0**-8]).astype(np.float32)
    values = np.concatenate([values, ties, np.array(EDGES, np.float32)])
    right = torch.from_numpy(values).to(getattr(torch, dtype)).double().numpy()
    given = nearest(values.astype(np.float64), dtype)
    np.testing.assert_array_equal(given, right)
    np.testing.assert_array_equal(np.signbit(given), np.signbit(right))


def test_the_oracle_rounds_float64_once():
    """By way of float32 these would be ties, and go to even."""
    assert nearest(np.array([1 + 2**-8 + 2**-40]), "bfloat16") == 1 + 2**-7
    assert nearest(np.array([1 + 2**-11 + 2**-40]), "float16") == 1 + 2**-10


@pytest.fixture(scope="module")
def half(tapped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("half") / "folder"
    convert(tapped.source, folder, img_size=64, dtype="float16")
    return folder


def test_a_rounded_conversion_is_compared_without_its_rounding(tapped, half):
    verdict = verify(half, tapped.source, reference=str(tapped.recording))
    assert verdict.passed and verdict.precision == "float64", str(verdict)
    assert (verdict.rounding.dtype, verdict.rounding.tensors, verdict.rounding.wrong) == ("float16", 102, ())
    assert all(max(one.sample_errors) < 1e-12 for one in verdict.comparisons)
    assert all(1e-5 < one.information["rounding_error"] < 1e-1 for one in verdict.comparisons)
    assert len(verdict.taps) == 56 and all(tap.passed and tap.local_passed for tap in verdict.taps)


def toward_zero(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.view(torch.int16) - 1).view(torch.float16)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update({"layer1.0.conv1.weight": toward_zero(t["layer1.0.conv1.weight"])}), "rounded to float16"),
        (lambda t: t["fc.bias"].mul_(0).neg_(), "fc.bias is not the source's"),
        (lambda t: t.update({"bn1.bias": t["bn1.bias"].to(torch.bfloat16)}), "bn1.bias is not the source's"),
    ],
)  # fmt: skip
def test_another_rounding_fails(tapped, half, tmp_path, change, words):
    import shutil

    folder = shutil.copytree(half, tmp_path / "folder")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    subject = read_subject(folder)
    _, rounding = unrounded(subject, open_checkpoint(tapped.source))
    assert len(rounding.wrong) == 1 and not rounding.passed
    verdict = verify(folder, tapped.source, reference=str(tapped.recording), taps=False)
    assert not verdict.passed and verdict.outcome == "failed" and words in str(verdict)


def test_float64_weights_are_rounded_once(tmp_path):
    """Through float32 many of these would be rounded twice."""
    import timm

    torch.manual_seed(0)
    state = timm.create_model("mobilenetv2_035", num_classes=3).double().state_dict()
    for tensor in state.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randint(1, 256, tensor.shape) * 2.0**-7 + 2.0**-8 + torch.rand(tensor.shape) * 2.0**-35)
    torch.save(state, tmp_path / "source.pth")
    for dtype in ("bfloat16", "float16"):
        convert(tmp_path / "source.pth", tmp_path / dtype, target="mobilenetv2_035", dtype=dtype)
        _, rounding = unrounded(read_subject(tmp_path / dtype), open_checkpoint(tmp_path / "source.pth"))
        assert rounding.passed and rounding.tensors > 200


def test_what_is_calculated_is_compared_before_it_is_rounded(tmp_path, family):
    """float32 has no room for a variance of 1 and an eps of 1e-8, nor has float64 for less than 1e-16."""
    import timm

    rows = "{conv1: conv1, bn1: bn1, 'layer{i}': 'layer{i}', fc: fc}"
    added = "leaves: {like: torch, running_var: running_var | add 1e-8}\n"
    mapping = family(f"rules: {rows}\n", head=f"targets: {{resnet18: }}\ndetect: [fc]\n{added}")
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet18", num_classes=3).state_dict(), tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", family=str(mapping.path))
    subject, source = read_subject(tmp_path / "out"), open_checkpoint(tmp_path / "source.pth")
    exact, rounding = unrounded(subject, source)
    assert rounding.passed and (rounding.dtype, rounding.tensors) == ("float32", 20) and len(exact) == 20
    assert exact["bn1.running_var"].dtype == torch.float64 and float(exact["bn1.running_var"][0]) == 1 + 1e-8
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["bn1.running_var"][3] += 1e-3
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert unrounded(subject, source)[1].wrong == ("bn1.running_var",)


def test_what_a_formula_gives_is_compared_before_it_is_rounded(tmp_path, family):
    import timm

    rows = "{cls_token: cls_token, patch_embed: patch_embed, blocks: blocks, norm: norm, head: head}"
    mapping = family(f"rules: {rows}\nfill: {{pos_embed: sincos2d}}\n", "targets: {test_vit: }\ndetect: [head]\n")
    args = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    state = timm.create_model("test_vit", num_classes=3, **args).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if name != "pos_embed"}, tmp_path / "source.pth")
    convert(tmp_path / "source.pth", tmp_path / "out", family=str(mapping.path), args=args)
    subject, source = read_subject(tmp_path / "out"), open_checkpoint(tmp_path / "source.pth")
    exact, rounding = unrounded(subject, source)
    assert (list(exact), rounding.dtype, rounding.passed) == (["pos_embed"], "float32", True)
    assert 0 < (exact["pos_embed"] - exact["pos_embed"].float()).abs().max() < 1e-7
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    tensors["pos_embed"][0, 3, 3] += 1e-5
    save_file(tensors, tmp_path / "out" / "model.safetensors", {"format": "pt"})
    assert unrounded(subject, source)[1].wrong == ("pos_embed",)


def test_a_kept_dtype_is_not_looked_at(tapped):
    assert unrounded(read_subject(tapped.folder), open_checkpoint(tapped.source)) == ({}, None)
