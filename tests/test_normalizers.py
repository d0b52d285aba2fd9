"""Every normalizer against timm's own function, or against its definition."""

from __future__ import annotations

import pytest
import torch
from timm.layers import resample_abs_pos_embed, resample_abs_pos_embed_nhwc, resample_patch_embed
from timm.layers.pos_embed_rel import (
    resize_rel_pos_bias_table,
    resize_rel_pos_bias_table_levit,
    resize_rel_pos_bias_table_simple,
)
from timm.models._manipulate import adapt_input_conv
from torch.nn.functional import interpolate

from converters.normalizers import (
    channels,
    offsets,
    patches,
    position_map,
    positions,
    rows,
    table,
    zeros,
)
from converters.ops import Op


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def close(op: Op, source: torch.Tensor, wanted: torch.Tensor) -> bool:
    """timm calculates in float32."""
    (found,) = op.run([source], 1)
    assert found.dtype == source.dtype and found.shape == wanted.shape
    meta = op.run([source.to("meta")], 1)[0]
    assert meta.shape == wanted.shape, "a plan checks shapes"
    return torch.allclose(found, wanted, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(("old", "new"), [((16, 16), (8, 8)), ((8, 8), (16, 16)), ((16, 16), (14, 12))])
def test_patches(old, new):
    source = drawn(5, 3, *old)
    assert close(patches(old, new, "timm"), source, resample_patch_embed(source, list(new)))
    plain = interpolate(source, size=new, mode="bicubic")
    assert close(patches(old, new, "bicubic"), source, plain)


def test_a_kernel_for_larger_patches_gives_the_same_tokens():
    """FlexiViT's definition: enlarging patches and kernels together changes no token."""
    kernel, patch = drawn(4, 3, 8, 8, dtype=torch.float64), drawn(1, 3, 8, 8, dtype=torch.float64)
    (larger,) = patches((8, 8), (16, 16), "timm").run([kernel], 1)
    enlarged = interpolate(patch, size=(16, 16), mode="bicubic", antialias=True)
    tokens = [torch.nn.functional.conv2d(patch, kernel), torch.nn.functional.conv2d(enlarged, larger)]
    assert torch.allclose(*tokens, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("old", "new"), [((7, 7), (12, 12)), ((4, 6), (8, 8)), ((8, 8), (4, 6))])
def test_positions(old, new, prefix):
    source = drawn(1, prefix + old[0] * old[1], 6)
    wanted = resample_abs_pos_embed(source, list(new), list(old), num_prefix_tokens=prefix)
    assert close(positions(old, new, prefix, "timm"), source, wanted)
    assert torch.equal(positions(old, new, prefix, "timm").run([source], 1)[0][:, :prefix], source[:, :prefix])
    plain = resample_abs_pos_embed(source, list(new), list(old), prefix, interpolation="bilinear", antialias=False)
    assert close(positions(old, new, prefix, "bilinear"), source, plain)


def test_position_maps():
    source = drawn(1, 5, 7, 6)
    wanted = resample_abs_pos_embed_nhwc(source, [9, 4])
    assert close(position_map((5, 7), (9, 4), True, "timm"), source, wanted)
    turned = source.permute(0, 3, 1, 2)
    assert close(position_map((5, 7), (9, 4), False, "timm"), turned, wanted.permute(0, 3, 1, 2))


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize(("old", "new"), [(7, 12), (12, 7), (8, 16)])
def test_tables(old, new, extra):
    source = drawn((2 * old - 1) ** 2 + extra, 4)
    shape = ((2 * new - 1) ** 2 + extra, 4)
    wanted = resize_rel_pos_bias_table(source, (new, new), shape)
    assert close(table((old, old), (new, new), extra, "timm"), source, wanted)
    plain = resize_rel_pos_bias_table_simple(source, (new, new), shape)
    found = table((old, old), (new, new), extra, "bicubic").run([source], 1)[0]
    assert torch.allclose(found[shape[0] - extra :], source[source.shape[0] - extra :])
    assert torch.allclose(found, plain, rtol=1e-5, atol=2e-5)


def test_a_table_of_windows_that_are_not_square():
    source = drawn(5 * 7, 2)
    wanted = resize_rel_pos_bias_table(source, (5, 6), (9 * 11, 2), old_window_size=(3, 4))
    assert close(table((3, 4), (5, 6), 0, "timm"), source, wanted)


def test_offsets():
    source = drawn(3, 49)
    wanted = resize_rel_pos_bias_table_levit(source.T, (144, 3)).T
    assert close(offsets((7, 7), (12, 12), "timm"), source, wanted)


@pytest.mark.parametrize("new", [1, 4, 5, 6])
@pytest.mark.parametrize("pixels", [1, 4])
def test_channels(new, pixels):
    source = drawn(6, 3 * pixels, 3, 3)
    if pixels == 1 or new == 1:
        assert close(channels(3, new), source, adapt_input_conv(new, source, 3))
    if new in (1, 6):  # a grey image, as it was or as often as it now stands there, gives what it gave
        (found,) = channels(3, new).run([source.double()], 1)
        gray = drawn(1, 1, 8, 8, dtype=torch.float64)
        before, after = (gray.repeat(1, count * pixels, 1, 1) for count in (3, new))
        conv = torch.nn.functional.conv2d
        assert torch.allclose(conv(before, source.double()), conv(after, found))


def test_an_alpha_channel_has_no_weight():
    source = drawn(6, 3, 2, 2)
    (found,) = channels(3, 4, alpha=True).run([source], 1)
    assert torch.equal(found[:, :3], source) and not found[:, 3:].any() and found.shape[1] == 4


def test_classes():
    source = drawn(5, 3)
    assert torch.equal(rows(range(1, 5)).run([source], 1)[0], source[1:])
    assert torch.equal(rows([4, 0]).run([source], 1)[0], source[[4, 0]])
    assert [op.text for op in (rows(range(1, 5)), rows([4, 0]))] == ["classes 1..4", "classes 2 of a list"]
    assert not zeros(7).run([source], 1)[0].any() and zeros(7).run([source[:, 0]], 1)[0].shape == (7,)


def test_half_precision_is_rounded_once():
    source = drawn(1, 3, 2, 2, dtype=torch.float16)
    wanted = source.double().sum(1, keepdim=True).half()
    assert torch.equal(channels(3, 1).run([source], 1)[0], wanted)
    assert not channels(3, 1).invert
