"""DeepSpeed folders of ZeRO stages 1 and 2, in the documented layout: flat float32 parts are put together again."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from converters.errors import CheckpointError
from converters.readers import open_checkpoint
from converters.tensors import from_torch

GROUPS = (  # trained with and without weight decay
    {"stem.weight": (4, 3, 3), "fc.weight": (5, 7)},
    {"stem.bias": (4,), "fc.bias": (5,), "scale": ()},
)
TAG = "global_step100"


def masters() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for group in GROUPS for name, shape in group.items()}


def parts(count: int, stage: int = 2) -> list[dict[str, Any]]:
    """What each process holds of the float32 weights: padded to a multiple of twice their count, and cut evenly."""
    flat = []
    for group in GROUPS:
        joined = torch.cat([masters()[name].reshape(-1) for name in group])
        length = math.ceil(joined.numel() / (2 * count)) * 2 * count
        flat.append(torch.cat([joined, torch.zeros(length - joined.numel())]).chunk(count))
    return [
        {
            "optimizer_state_dict": {
                "zero_stage": stage,
                "partition_count": [count] * len(GROUPS),
                "single_partition_of_fp32_groups": [pieces[rank].clone() for pieces in flat],
                "base_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
            },
            "ds_version": "0.16.4",
        }
        for rank in range(count)
    ]


def module() -> dict[str, torch.Tensor]:
    found = {name: tensor.bfloat16() for name, tensor in masters().items()}
    return {**found, "frozen": torch.ones(2).bfloat16(), "bn.running_mean": torch.ones(3), "tied": found["fc.weight"]}


def write(folder: Path, count: int = 2, mark: str = "", **changes: Any) -> Path:
    """A checkpoint's folder, as `engine.save_checkpoint` leaves it."""
    state = {
        "module": module(),
        "buffer_names": ["bn.running_mean"],
        "optimizer": None,
        "param_shapes": [{name: torch.Size(shape) for name, shape in group.items()} for group in GROUPS],
        "frozen_param_shapes": {"frozen": torch.Size([2])},
        "shared_params": {"tied": "fc.weight"},
        "ds_config": {"zero_optimization": {"stage": 2}},
        "ds_version": "0.16.4",
        "global_steps": 100,
        **changes,
    }
    (folder / TAG).mkdir(parents=True)
    torch.save(state, folder / TAG / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(parts(count)):
        torch.save(part, folder / TAG / f"{mark}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    (folder / "latest").write_text(TAG)
    (folder / "zero_to_fp32.py").write_text("print('never run')")
    return folder


@pytest.mark.parametrize("mark", ["", "bf16_"])
@pytest.mark.parametrize("count", [1, 2, 3, 11])  # ten sorts before two where names are compared as text
def test_the_float32_weights_are_put_together(count: int, mark: str, tmp_path: Path) -> None:
    write(tmp_path, count, mark)
    expected = {**module(), **masters(), "tied": masters()["fc.weight"]}
    for path in (tmp_path, tmp_path / TAG):
        found = open_checkpoint(path)
        assert (found.format, found.wrappers, found.writer) == ("DeepSpeed folder", ("module",), "DeepSpeed 0.16.4")
        assert list(found.tensors) == list(module())
        for name, tensor in found.tensors.items():
            assert (tensor.spec.name, tensor.spec.shape) == (name, tuple(expected[name].shape))
            raw = tensor.read()
            assert not raw.readonly
            assert raw == from_torch(expected[name]), name
        assert found.notes == (f"6 weights are float32, from {count} optimizer parts; 2 are as the module has them",)
        assert len(found.files) == count + 1 + (path == tmp_path)
        assert found.metadata["global_steps"] == 100


def test_without_the_parts_the_module_is_read(tmp_path: Path) -> None:
    for part in write(tmp_path).glob("*/*optim*"):
        part.unlink()
    found = open_checkpoint(tmp_path)
    assert all(found.tensors[name].read() == from_torch(tensor) for name, tensor in module().items())
    assert found.notes == ("the float32 weights are not there; these are the module's copies",)


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = next((folder / TAG).glob(f"*{name}*"))
        state = torch.load(path)
        change(state)
        torch.save(state, path)

    return run


def optimizer(**changes: Any) -> Callable[[Path], None]:
    return edit("rank_0_mp_rank_00_optim", lambda state: state["optimizer_state_dict"].update(changes))


def rename(pattern: str, name: str) -> Callable[[Path], Any]:
    return lambda folder: next((folder / TAG).glob(pattern)).rename(folder / TAG / name)


FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "stage 3": (
        rename("mp_rank*", "zero_pp_rank_0_mp_rank_00_model_states.pt"),
        f"{TAG}: is of ZeRO stage 3, which cuts every weight into parts; run its zero_to_fp32.py",
    ),
    "stage 3 by its number": (
        optimizer(zero_stage=3),
        r"optim_states\.pt: is of ZeRO stage 3; run its zero_to_fp32\.py, which puts the weights together",
    ),
    "model parallelism": (
        lambda folder: (folder / TAG / "mp_rank_01_model_states.pt").write_bytes(b""),
        f"{TAG}: is cut over 2 files by model or expert parallelism; save the whole state dict",
    ),
    "a part is missing": (
        lambda folder: next((folder / TAG).glob("*rank_1*optim*")).unlink(),
        r"optim_states\.pt: is one of 2 parts, but 1 are there; fetch them all",
    ),
    "a pipeline": (edit("model_states", lambda state: state.update(module=None)), r"states\.pt: holds no module"),
    "no groups": (optimizer(single_partition_of_fp32_groups=[]), "its param_shapes make no sense"),
    "short parts": (optimizer(single_partition_of_fp32_groups=[torch.ones(3)] * 2), "its float32 parts are too short"),
    "long parts": (
        optimizer(single_partition_of_fp32_groups=[torch.ones(99)] * 2),
        "its weights take 71 elements, but the parts hold 135",
    ),
    "half parts": (optimizer(single_partition_of_fp32_groups=[torch.ones(36).half()] * 2), "its param_shapes make no"),
    "other shapes": (
        edit("model_states", lambda state: state.update(param_shapes=[{**GROUPS[0], "fc.weight": (7, 5)}, GROUPS[1]])),
        r"fc\.weight: has the shape \(7, 5\) in param_shapes, but not in the module",
    ),
    "unknown weight": (
        edit("model_states", lambda state: state.update(param_shapes=[{"x": (4, 3, 3), "y": (5, 7)}, GROUPS[1]])),
        r"x: has the shape \(4, 3, 3\) in param_shapes, but not in the module",
    ),
    "fewer shapes": (
        edit("model_states", lambda state: state.update(param_shapes=[GROUPS[0]])),
        "its param_shapes make no sense; run its zero_to_fp32.py",
    ),
    "negative shapes": (
        edit("model_states", lambda state: state.update(param_shapes=[{"x": (-4, -3)}])),
        "its param_shapes make no sense",
    ),
    "no shapes": (edit("model_states", lambda state: state.pop("param_shapes")), "its param_shapes make no sense"),
    "latest leads out": (
        lambda folder: (folder / "latest").write_text("../x"),
        r"latest: needs \.\./x, which is no fi",
    ),
    "latest is gone": (
        lambda folder: (folder / "latest").write_text("global_step9"),
        "latest: needs global_step9, which",
    ),
    "latest is another": (
        lambda folder: ((folder / "empty").mkdir(), (folder / "latest").write_text("empty")),
        r"empty: holds no \*_model_states\.pt; fetch the whole folder",
    ),
    "cut short": (
        lambda folder: (folder / TAG / "mp_rank_00_model_states.pt").write_bytes(b"PK\x03\x04"),
        r"mp_rank_00_model_states\.pt: does not end with a zip directory",
    ),
}


@pytest.mark.parametrize(("break_it", "words"), FAULTS.values(), ids=FAULTS)
def test_faults(break_it: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    break_it(write(tmp_path / "saved"))
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{words}[^\n]*$"):
        open_checkpoint(tmp_path / "saved")


def test_a_flipped_bit_in_a_part_is_found(tmp_path: Path) -> None:
    part = next(write(tmp_path).glob("*/zero_pp_rank_1*"))
    data = bytearray(part.read_bytes())
    data[data.index(masters()["fc.bias"].numpy().tobytes()[-8:])] ^= 1
    part.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"zero_pp_rank_1\S+: (fc\.bias|scale): its CRC-32 differs"):
        for tensor in open_checkpoint(tmp_path).tensors.values():
            tensor.read()
