"""`timmport diff`, on files of two formats."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from converters import differences
from converters.cli import app
from converters.differences import diff


def weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        "stem.weight": torch.randn(8, 3, 3, 3, generator=draw),
        "stem.bias": torch.randn(8, generator=draw),
        "blocks.0.norm.weight": torch.randn(8, generator=draw),
        "blocks.1.norm.weight": torch.randn(8, generator=draw).half(),
        "blocks.1.norm.num_batches_tracked": torch.tensor(7),
        "empty": torch.zeros(0, 4),
    }


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """The same weights, as a training script leaves them and as safetensors."""
    wrapped = {"epoch": 3, "state_dict": {f"module.{name}": tensor for name, tensor in weights().items()}}
    torch.save(wrapped, tmp_path / "a.pth")
    save_file(weights(), tmp_path / "b.safetensors")
    np.savez(tmp_path / "c.npz", **{name: tensor.numpy() for name, tensor in weights().items()})
    return tmp_path / "a.pth", tmp_path / "b.safetensors"


def command(*words: Any) -> tuple[int, Any]:
    done = CliRunner().invoke(app, ["diff", *map(str, words), "--json"])
    assert done.exit_code in (0, 3), done.output or done.exception
    return done.exit_code, json.loads(done.stdout)


def test_two_formats_of_the_same_weights_are_equal(files):
    code, found = command(*files)
    assert code == 0 and found["equal"] and found["common"] == 6
    assert diff(files[0].with_name("c.npz"), files[1]).equal
    assert found["prefixes"] == ["", ""] and not found["ailments"]


def change(path: Path, **edits: Any) -> None:
    tensors = weights()
    for name, edit in edits.items():
        name = name.replace("__", ".")
        if edit is None:
            del tensors[name]
        else:
            tensors[name] = edit(tensors[name]) if name in tensors else edit(None)
    save_file(tensors, path)


def next_up(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(tensor, torch.tensor(torch.inf))


def with_nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[3] = torch.nan
    return tensor


@pytest.mark.parametrize(
    ("edits", "kind", "names"),
    [
        ({"stem__bias": None}, "missing", ["stem.bias"]),
        ({"head__bias": lambda _: torch.zeros(2)}, "extra", ["head.bias"]),
        ({"stem__weight": lambda t: t.transpose(0, 1).contiguous()}, "shapes", ["stem.weight"]),
        ({"blocks__1__norm__weight": lambda t: t.float()}, "dtypes", ["blocks.1.norm.weight"]),
        ({"stem__bias": next_up}, "values", ["stem.bias"]),
        ({"stem__bias": with_nan}, "values", ["stem.bias"]),
        ({"blocks__1__norm__num_batches_tracked": lambda t: t + 1}, "values", ["blocks.1.norm.num_batches_tracked"]),
    ],
)
def test_each_difference_is_found_alone(files, edits, kind, names):
    change(files[1], **edits)
    code, found = command(*files)
    assert code == 3 and [one["name"] for one in found[kind]] == names
    assert not any(found[other] for other in ("missing", "extra", "shapes", "dtypes", "values") if other != kind)


def test_distances(tmp_path):
    """Against figures worked out by hand; NaN is equal to NaN, and -0 to 0."""
    one = torch.tensor([3.0, 4.0, 0.0, torch.nan, torch.inf, 1.0])
    other = torch.tensor([3.0, 4.5, -0.0, torch.nan, 2.0, 1.0 + 3 * 2.0**-23])
    save_file({"w": one, "h": one.bfloat16()}, tmp_path / "a.safetensors")
    save_file({"w": other, "h": one.bfloat16()}, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    (pair,) = found.values
    assert pair.distance.elements == 3 and pair.distance.max_abs == 0.5
    assert pair.distance.relative_l2 == pytest.approx(0.5 / 26**0.5)
    assert pair.distance.ulps == 2**20  # 4 to 4.5 is an eighth of the 2**23 steps of its binade
    assert {(a.side, a.kind) for a in found.ailments} == {
        ("first", "NaN"),
        ("first", "Inf"),
        ("second", "NaN"),
        ("second", "Inf"),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_neighbours_are_one_step_apart_on_both_sides_of_zero(dtype, tmp_path):
    least = torch.tensor([1, -1]).to({8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize])
    least[1] = torch.iinfo(least.dtype).min + 1  # the bits of the smallest negative
    save_file({"w": least.view(dtype)}, tmp_path / "a.safetensors")
    save_file({"w": torch.zeros(2, dtype=dtype)}, tmp_path / "b.safetensors")
    assert diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").values[0].distance.ulps == 1


def test_prefixes_are_taken_off_only_if_nothing_matches(files, tmp_path):
    save_file({f"backbone.{name}": tensor for name, tensor in weights().items()}, tmp_path / "c.safetensors")
    code, found = command(files[0], tmp_path / "c.safetensors")
    assert code == 0 and found["prefixes"] == ["", "backbone."] and found["common"] == 6
    code, found = command(tmp_path / "c.safetensors", files[0])
    assert code == 0 and found["prefixes"] == ["backbone.", ""]


def test_dead_batch_norms(tmp_path):
    state = torch.nn.BatchNorm2d(4).state_dict()
    torch.save({f"bn.{name}": tensor for name, tensor in state.items()}, tmp_path / "bn.pth")
    torch.save({f"bn.{n}": t * 0 if n != "num_batches_tracked" else t for n, t in state.items()}, tmp_path / "zero.pth")
    found = diff(tmp_path / "bn.pth", tmp_path / "zero.pth")
    assert [(a.side, a.name, a.kind, a.elements) for a in found.ailments] == [
        ("first", "bn.running_var", "statistics of a new batch norm", 4),
        ("second", "bn.running_var", "variance of 0", 4),
        ("second", "bn.weight", "gain of 0 throughout", 4),
    ]


def test_a_timm_model_is_compared_by_names_and_shapes(tmp_path):
    import timm

    state = timm.create_model("resnet18", num_classes=10).state_dict()
    torch.save({"model": {name: tensor.half() for name, tensor in state.items()}}, tmp_path / "a.pth")
    code, found = command(tmp_path / "a.pth", "resnet18", "--arg", "num_classes=10")
    assert code == 0 and found["against_model"] and found["common"] == len(state)
    code, found = command(tmp_path / "a.pth", "resnet18")
    assert code == 3 and {one["name"] for one in found["shapes"]} == {"fc.weight", "fc.bias"}


def test_one_file_with_itself_under_two_keys(tmp_path):
    torch.save(
        {"state_dict": weights(), "state_dict_ema": {n: t + 1 for n, t in weights().items()}}, tmp_path / "a.pth"
    )
    code, found = command(tmp_path / "a.pth", tmp_path / "a.pth", "--key", "state_dict", "--key-b", "state_dict_ema")
    assert code == 3 and len(found["values"]) == 5


def test_the_report_is_folded(files):
    change(files[1], stem__weight=lambda t: t * 2, stem__bias=lambda t: t + 1, head__bias=lambda _: torch.zeros(2))
    done = CliRunner().invoke(app, ["diff", *map(str, files)])
    assert done.exit_code == 3
    assert "DIFFERENT" in done.stdout and "1 extra, 2 of other values" in done.stdout
    assert "stem.{weight,bias}" in done.stdout and "relative L2" in done.stdout


def test_what_is_neither_file_nor_model_is_refused(files, tmp_path):
    done = CliRunner().invoke(app, ["diff", str(files[0]), "no_such_model"])
    assert done.exit_code == 1 and "no_such_model" in str(done.exception)


def test_two_tensors_are_in_memory_at_once(files, monkeypatch):
    alive: list[weakref.ref] = []
    most: list[int] = []

    def counted(raw, spec):
        array = np.frombuffer(raw, np.uint8).copy()
        alive.append(weakref.ref(array))
        most.append(sum(ref() is not None for ref in alive))
        return (
            torch.frombuffer(array, dtype=getattr(torch, spec.dtype)).reshape(spec.shape)
            if array.size
            else torch.empty(0)
        )

    monkeypatch.setattr(differences, "to_torch", counted)
    assert diff(*files).equal and len(most) == 12 and max(most) == 2
