"""Hostile and damaged folders and archives of several files, each in a watched child."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from converters.errors import ConverterError
from converters.readers import open_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = {"w": torch.arange(64.0), "v": torch.ones(3)}
SOUND = {name: tensor.numpy().tobytes() for name, tensor in WEIGHTS.items()}
INDEX = "model.safetensors.index.json"


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("true",)


def safetensors(folder: Path) -> None:
    for number, name in enumerate(WEIGHTS, 1):
        save_file({name: WEIGHTS[name]}, folder / f"model-{number}.safetensors")
    write_index(folder, {name: f"model-{number}.safetensors" for number, name in enumerate(WEIGHTS, 1)})


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 268}, "weight_map": weight_map}))


def distributed(folder: Path) -> None:
    dcp.save(dict(WEIGHTS), checkpoint_id=folder, no_dist=True)


def deepspeed(folder: Path, **beside: Any) -> None:
    (folder / "latest").write_text("step1")
    (folder / "step1").mkdir()
    shapes = [{name: tuple(tensor.shape) for name, tensor in WEIGHTS.items()}]
    state = {"module": {name: tensor.half() for name, tensor in WEIGHTS.items()}, "param_shapes": shapes, **beside}
    torch.save(state, folder / "step1" / "mp_rank_00_model_states.pt")
    flat = torch.cat([*WEIGHTS.values(), torch.zeros(1)])
    part = {"zero_stage": 1, "partition_count": 1, "single_partition_of_fp32_groups": [flat]}
    torch.save({"optimizer_state_dict": part}, folder / "step1" / "zero_pp_rank_0_mp_rank_00_optim_states.pt")


def keras(folder: Path) -> None:
    places = {f"/layers/{name}/vars": f"m_{number}.weights.h5" for number, name in enumerate(WEIGHTS)}
    for group, place in places.items():
        with h5py.File(folder / place, "w") as file:
            file[f"{group}/kernel"] = WEIGHTS[group.split("/")[2]]
            file[group].attrs["name"] = group.split("/")[2]
    (folder / "m.weights.json").write_text(json.dumps({"metadata": {"total_size": 268}, "weight_map": places}))


def exported(folder: Path) -> None:
    """What torch.export.save writes, as far as weights go."""
    with zipfile.ZipFile(folder / "m.pt2", "w") as archive:
        config = {}
        for name, data in SOUND.items():
            meta = {"dtype": 7, "sizes": [{"as_int": len(data) // 4}], "strides": [{"as_int": 1}]}
            meta |= {"storage_offset": {"as_int": 0}}
            config[name] = {"path_name": name, "use_pickle": False, "tensor_meta": meta}
            archive.writestr(f"m/data/weights/{name}", data)
        archive.writestr("m/data/weights/model_weights_config.json", json.dumps({"config": config}))


def shard_named(name: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        safetensors(folder)
        save_file({"v": WEIGHTS["v"]}, folder.parent / "x.safetensors")
        write_index(folder, {"w": "model-1.safetensors", "v": name})

    return make


def linked(to: str) -> Callable[[Path], None]:
    """A sound folder in which a shard is a link."""

    def make(folder: Path) -> None:
        safetensors(folder)
        (folder / "model-2.safetensors").unlink()
        save_file({"v": WEIGHTS["v"]}, folder.parent / "x.safetensors")
        (folder / "model-2.safetensors").symlink_to(to)

    return make


def fifo(folder: Path) -> None:
    safetensors(folder)
    (folder / "model-2.safetensors").unlink()
    os.mkfifo(folder / "model-2.safetensors")


def metadata(data: bytes) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        distributed(folder)
        (folder / ".metadata").write_bytes(data)

    return make


def many_shards(folder: Path) -> None:
    safetensors(folder)
    write_index(folder, {str(i): f"{i}.safetensors" for i in range(200_000)})


def huge_index(folder: Path) -> None:
    safetensors(folder)
    with (folder / INDEX).open("r+b") as file:
        file.truncate(1 << 40)


def deep_state(folder: Path) -> None:
    deepspeed(folder)
    (folder / "latest").write_bytes(b"../" * 1_000_000)


def payload_in_a_chunk(folder: Path) -> None:
    """The chunk is an archive whose pickle names os.system."""
    distributed(folder)
    chunks = bytearray((folder / "__0_0.distcp").read_bytes())
    at = chunks.index(b"ctorch._utils\n_rebuild_tensor_v2\n")
    chunks[at : at + 34] = b"cposix\nsystem\n" + b"0N" * 10
    (folder / "__0_0.distcp").write_bytes(chunks)


DEEP = b"\x80\x04" + b"]" * 200_000 + b"a" * 199_999 + b"."
OPENS = "opens"
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "sound safetensors": (safetensors, OPENS),
    "sound distributed": (distributed, OPENS),
    "sound DeepSpeed": (deepspeed, OPENS),
    "27 parent folder": (shard_named("../x.safetensors"), "needs ../x.safetensors, which is no file beside it"),
    "27 absolute": (shard_named("/etc/passwd"), "needs /etc/passwd, which is no"),
    "27 absolute, by its ending": (shard_named("/etc/x.safetensors"), "needs /etc/x.safetensors, which is no file"),
    "27 backslashes": (shard_named("..\\x.safetensors"), r"needs ..\x.safetensors, which is no file beside it"),
    "27 drive": (shard_named("C:x.safetensors"), "needs C:x.safetensors, which is no file beside it"),
    "27 URL": (shard_named("http://x/x.safetensors"), "needs http://x/x.safetensors, which is no file beside it"),
    "27 pickle": (shard_named("pytorch_model.bin"), "needs pytorch_model.bin, which is no safetensors file"),
    "27 link outside": (linked("../x.safetensors"), "needs model-2.safetensors, a link that leaves the folder"),
    "27 link to a device": (linked("/dev/zero"), "needs model-2.safetensors, a link that leaves the folder"),
    "27 link to itself": (linked("model-2.safetensors"), "needs model-2.safetensors, which is missing"),
    "28 missing shard": (shard_named("model-3.safetensors"), "needs model-3.safetensors, which is missing"),
    "28 one shard for all": (shard_named("model-1.safetensors"), "v: is not in model-1.safetensors"),
    "28 very many shards": (many_shards, "safetensors, which is missing"),
    "41 a pipe": (fifo, "is not a regular file"),
    "index of a terabyte": (huge_index, "takes more than 100,000,000 bytes"),
    "os.system in .metadata": (metadata(pickle.dumps(Payload())), "its pickle names posix.system, which runs code"),
    "os.system in a chunk": (payload_in_a_chunk, "CRC-32 of its archive/data.pkl differs"),
    "os.system in DeepSpeed": (lambda folder: deepspeed(folder, x=Payload()), "its pickle names posix.system"),
    "deep .metadata": (metadata(DEEP), "its pickle makes no sense"),
    "empty .metadata": (metadata(b""), "its pickle breaks off"),
    "text of 2**62 bytes": (metadata(b"\x80\x04\x8d" + struct.pack("<Q", 1 << 62)), "its pickle breaks off"),
    "latest of a megabyte": (deep_state, "needs ../../"),
}


def open_cleanly(path: Path) -> dict[str, bytes] | None:
    try:
        return {name: bytes(tensor.read()) for name, tensor in open_checkpoint(path).tensors.items()}
    except ConverterError as error:
        assert "\n" not in str(error)
        return None


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    here, root = Path(__file__).parent, tmp_path_factory.mktemp("attacks")
    folders = [root / str(index) / "model" for index in range(len(CASES))]
    for folder, (make, _) in zip(folders, CASES.values(), strict=True):
        folder.mkdir(parents=True)
        make(folder)
    command = [sys.executable, here / "watched.py", here.parents[1], *folders]
    child = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (child.returncode, child.stderr) == (0, "")
    return dict(zip(CASES, json.loads(child.stdout).values(), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_attacks(name: str, outcomes: dict[str, Any]) -> None:
    outcome, words = outcomes[name], CASES[name][1]
    assert outcome["broken"] == []
    if words == OPENS:
        assert outcome["tensors"] == {key: data.hex() for key, data in SOUND.items()}
    else:
        assert words in outcome["refusal"]
        assert outcome["refusal"].isprintable()
        assert len(outcome["refusal"]) < 1000


FILES = {
    "index": (safetensors, INDEX),
    "metadata": (distributed, ".metadata"),
    "chunks": (distributed, "__0_0.distcp"),
    "DeepSpeed's weights": (deepspeed, "step1/mp_rank_00_model_states.pt"),
    "DeepSpeed's parts": (deepspeed, "step1/zero_pp_rank_0_mp_rank_00_optim_states.pt"),
    "Keras's index": (keras, "m.weights.json"),
    "torch.export": (exported, "m.pt2"),
}


@pytest.mark.parametrize(("make", "name"), FILES.values(), ids=FILES)
def test_a_file_cut_anywhere_is_refused(make: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    make(tmp_path)
    data = (tmp_path / name).read_bytes()
    opened = tmp_path / name if make in (keras, exported) else tmp_path
    assert (open_cleanly(opened) or {}).keys() >= ({"w/kernel"} if make is keras else SOUND.keys())
    for end in reversed(range(0, len(data), 1 if len(data) < 1000 else 7)):
        os.truncate(tmp_path / name, end)
        assert open_cleanly(opened) is None, end


@pytest.mark.parametrize(("make", "name"), FILES.values(), ids=FILES)
def test_a_flipped_bit_never_crashes_nor_moves_data(make: Callable[[Path], Any], name: str, tmp_path: Path) -> None:
    """Neither index has a checksum, but a tensor of its own name has its own shape and bytes."""
    make(tmp_path)
    data = (tmp_path / name).read_bytes()
    opened = tmp_path / name if make in (keras, exported) else tmp_path
    sound = open_cleanly(opened) or {}
    with (tmp_path / name).open("r+b", buffering=0) as file:
        for bit in range(0, 8 * len(data), 1 if len(data) < 1000 else 29):
            os.pwrite(file.fileno(), bytes([data[bit // 8] ^ 1 << bit % 8]), bit // 8)
            found = open_cleanly(opened) or {}
            assert all(sound[key] == value for key, value in found.items() if key in sound), bit
            os.pwrite(file.fileno(), data[bit // 8 : bit // 8 + 1], bit // 8)
