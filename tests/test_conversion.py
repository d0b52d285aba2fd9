"""The flow: what `convert` leaves behind, and that it leaves nothing behind when it fails."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from converters import convert, inspect
from converters.errors import ConverterError, DamagedCheckpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("source") / "resnet18.pth"
    model = timm.create_model("resnet18", num_classes=10)
    torch.save({"arch": "resnet18", "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    return path


def test_a_flipped_bit_of_a_copied_tensor_is_found_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    state = torch.load(source, weights_only=True)["state_dict"]
    raw = state["module.layer3.0.conv1.weight"].numpy().tobytes()
    damaged = bytearray(source.read_bytes())
    damaged[damaged.index(raw[:64]) + 1000] ^= 4
    path = tmp_path / "damaged.pth"
    path.write_bytes(damaged)
    with pytest.raises(DamagedCheckpoint, match=r"damaged.pth: .*layer3.0.conv1.weight: its CRC-32 differs"):
        convert(path, tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged.pth"]


def test_runs_agree_to_the_byte(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(source, tmp_path / name)
    for file in ("model.safetensors", "config.json", "conversion.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_a_dry_run_reads_no_data_and_writes_nothing(source: Path, tmp_path: Path) -> None:
    conversion = convert(source, tmp_path / "out", dry_run=True)
    assert conversion.directory is None and not (tmp_path / "out").exists()
    assert len(conversion.plan.steps) == 122 and "sha256" not in conversion.record["source"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expect_sha256": "00"}, "has the SHA-256"),
        ({"target": "resnet19"}, "no model `resnet19`; did you mean"),
        ({"family": "mmlab/swim"}, "there is no family `mmlab/swim`"),
        ({"args": {"colour": "red"}}, "does not take .*colour='red'"),
        ({"key": "model.ema"}, "model.ema|model"),
    ],
)
def test_a_refusal_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConverterError, match=message) as error:
        convert(source, tmp_path / "out", **options)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_what_timm_reads_of_the_folder(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", dtype="float16")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert (model.num_classes, model.pretrained_cfg["classifier"]) == (10, "fc")
    features = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True, features_only=True)
    weight = torch.load(source, weights_only=True)["state_dict"]["module.layer1.0.conv1.weight"]
    assert torch.equal(features.state_dict()["layer1.0.conv1.weight"], weight.half().float())


def test_an_inspection_says_what_the_file_is_even_when_no_plan_closes(source: Path, tmp_path: Path) -> None:
    inspection = inspect(source)
    assert inspection.plan and inspection.plan.skeleton.architecture == "resnet18"
    assert inspection.checkpoint.wrappers == ("state_dict", "module.")
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "unknown.pth")
    inspection = inspect(tmp_path / "unknown.pth")
    assert inspection.plan is None and "known" in inspection.reason and inspection.nearest is None
