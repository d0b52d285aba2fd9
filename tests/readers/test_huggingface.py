"""Hugging Face folders: one file or shards, safetensors or pickles, as their own loaders read them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.errors import CheckpointError
from converters.readers import Checkpoint, open_checkpoint
from converters.tensors import from_torch

FIRST, SECOND = (f"model-{number:05}-of-00002.safetensors" for number in (1, 2))
HALVES = (
    {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(4).bfloat16(), "empty": torch.empty(0, 2)},
    {"b.weight": torch.randn(2, 3).half(), "count": torch.tensor(7)},
)
WHOLE = {name: tensor for half in HALVES for name, tensor in half.items()}
SIZE = sum(tensor.nbytes for tensor in WHOLE.values())
CONFIG = {"model_type": "convnext", "transformers_version": "4.49.0", "depths": [3, 3]}
SAVE: dict[str, Callable[[dict[str, torch.Tensor], Path], Any]] = {
    "model.safetensors": lambda tensors, path: save_file(tensors, path, metadata={"format": "pt"}),
    "pytorch_model.bin": torch.save,
}
FIRST_TF = "tf_model-00001-of-00002.h5"
ONES = np.ones(6, "f4").tobytes()[::4]
LOAD: dict[str, Callable[[Path], dict[str, torch.Tensor]]] = {"safetensors": load_file, "bin": torch.load}


def shard(folder: Path, name: str, halves: tuple[dict[str, torch.Tensor], ...] = HALVES) -> Path:
    """What save_pretrained writes where weights exceed one shard: shards, index and config."""
    stem, kind = name.rsplit(".", 1)
    weight_map = {}
    folder.mkdir(exist_ok=True, parents=True)
    for number, half in enumerate(halves, 1):
        part = f"{stem}-{number:05}-of-{len(halves):05}.{kind}"
        SAVE[name](half, folder / part)
        weight_map |= dict.fromkeys(half, part)
    write_index(folder / f"{name}.index.json", {"metadata": {"total_size": SIZE}, "weight_map": weight_map})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def write_index(path: Path, index: Any) -> None:
    path.write_text(index if isinstance(index, str) else json.dumps(index, indent=2))


def assert_whole(found: Checkpoint) -> None:
    assert set(found.tensors) == set(WHOLE)
    for name, tensor in found.tensors.items():
        assert (tensor.spec.name, tensor.spec.shape) == (name, tuple(WHOLE[name].shape))
        assert getattr(torch, tensor.spec.dtype) == WHOLE[name].dtype
        assert tensor.read() == from_torch(WHOLE[name])


@pytest.mark.parametrize("name", SAVE)
def test_shards_are_read_as_one(name: str, tmp_path: Path) -> None:
    folder = shard(tmp_path / "model", name)
    stem, kind = name.rsplit(".", 1)
    parts = [f"{stem}-00001-of-00002.{kind}", f"{stem}-00002-of-00002.{kind}"]
    loaded = {key: value for part in parts for key, value in LOAD[kind](folder / part).items()}
    for path in (folder, folder / f"{name}.index.json"):
        found = open_checkpoint(path)
        assert_whole(found)
        assert all(found.tensors[key].read() == from_torch(value) for key, value in loaded.items())
        assert [file.path.name for file in found.files] == [f"{name}.index.json", *parts, "config.json"]
        assert (found.format, found.writer) == ("Hugging Face folder", "Transformers 4.49.0")
        assert found.integrity == ("none in format" if kind == "safetensors" else "CRC-32 of every record")
        assert found.metadata["config.json"] == CONFIG
        assert found.metadata["index"] == {"total_size": SIZE}


def test_shards_may_lie_in_subfolders(tmp_path: Path) -> None:
    folder = shard(tmp_path / "snapshots" / "0123abc", "model.safetensors")
    (folder / "parts").mkdir()
    (tmp_path / "blobs").mkdir()
    (folder / SECOND).rename(tmp_path / "blobs" / "2")
    (folder / "parts" / "2.safetensors").symlink_to("../../../blobs/2")
    renamed("parts/2.safetensors")(folder)
    assert_whole(open_checkpoint(folder))


def test_a_folder_with_nothing_but_flax_weights(tmp_path: Path) -> None:
    from flax.serialization import to_bytes

    halves = [{f"vit/{i}": {"kernel": np.full((2, 3), i, "f4")}} for i in range(2)]
    names = ["vit/0/kernel", "vit/1/kernel"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "flax_model.msgpack").write_bytes(to_bytes({**halves[0], **halves[1]}))
    weight_map = {name: f"flax_model-{i}.msgpack" for i, name in enumerate(names)}
    write_index(tmp_path / "flax_model.msgpack.index.json", {"metadata": {"total_size": 48}, "weight_map": weight_map})
    for half, name in zip(halves, weight_map.values(), strict=True):
        (tmp_path / name).write_bytes(to_bytes(half))
    for folder in (tmp_path / "whole", tmp_path):
        (folder / "config.json").write_text(json.dumps(CONFIG))
        found = open_checkpoint(folder)
        assert (found.format, found.metadata["config.json"]) == ("Hugging Face folder", CONFIG)
        assert {name: found.tensors[name].read()[::4] for name in names} == {names[0]: bytes(6), names[1]: ONES}


def test_a_folder_with_nothing_but_tensorflow_weights(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "tf_model.h5", "w") as file:
        file.attrs["layer_names"] = [b"vit"]
        group = file.create_group("vit")
        group.attrs["weight_names"] = [b"tf_vit_model/vit/layer_._0/query/kernel:0"]
        group["tf_vit_model/vit/layer_._0/query/kernel:0"] = np.ones((2, 3), "f4")
    found = open_checkpoint(tmp_path)
    assert list(found.tensors) == ["vit/layer_._0/query/kernel"]


def test_shards_of_tensorflow_weights(tmp_path: Path) -> None:
    """As Transformers wrote them: a shard lists its variables, without the model that the index has before them."""
    names = {"vit/layer_._0/query/kernel:0": (2, 3), "vit/layer_._0/query/bias:0": (3,), "classifier/bias:0": (5,)}
    weight_map = {f"tf_vit/{name}": f"tf_model-0000{1 + i // 2}-of-00002.h5" for i, name in enumerate(names)}
    for name in names:
        with h5py.File(tmp_path / weight_map[f"tf_vit/{name}"], "a") as file:
            file[name] = np.full(names[name], len(name), "f4")
            file.attrs["layer_names"] = np.array([*file.attrs.get("layer_names", []), name.encode()], "S")
    write_index(tmp_path / "tf_model.h5.index.json", {"metadata": {"total_size": 56}, "weight_map": weight_map})
    found = open_checkpoint(tmp_path)
    assert {f"{name}:0": spec.shape for name, spec in found.specs.items()} == names
    for name, tensor in found.tensors.items():
        assert bytes(tensor.read()) == np.full(tensor.spec.shape, len(name) + 2, "f4").tobytes()
    write_index(tmp_path / "tf_model.h5.index.json", {"weight_map": {**weight_map, "tf_vit/ghost:0": FIRST_TF}})
    with pytest.raises(CheckpointError, match=r"ghost: is not in tf_model-00001-of-00002\.h5; are its shards of one"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors"])
def test_a_folder_with_one_file(name: str, tmp_path: Path) -> None:
    SAVE["pytorch_model.bin" if name.endswith("bin") else "model.safetensors"](WHOLE, tmp_path / name)
    found = open_checkpoint(tmp_path)
    assert_whole(found)
    assert [file.path.name for file in found.files] == [name]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert open_checkpoint(tmp_path).metadata["config.json"] == CONFIG


def test_safetensors_are_preferred_to_pickles(tmp_path: Path) -> None:
    torch.save({"other": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    assert_whole(open_checkpoint(shard(tmp_path, "model.safetensors")))


def test_pickled_shards_may_share_memory(tmp_path: Path) -> None:
    """The library counts it once in total_size."""
    tied = torch.randn(3, 4)
    folder = shard(tmp_path, "pytorch_model.bin", ({"a": tied, "b": tied}, {"c": torch.ones(2)}))
    path = folder / "pytorch_model.bin.index.json"
    index = json.loads(path.read_text())
    for size, is_read in [(tied.nbytes + 8, True), (2 * tied.nbytes + 8, True), (2 * tied.nbytes + 9, False)]:
        write_index(path, {**index, "metadata": {"total_size": size}})
        if is_read:
            assert set(open_checkpoint(folder).tensors) == {"a", "b", "c"}
        else:
            with pytest.raises(CheckpointError, match="its total_size is 105, but its tensors take 104 bytes"):
                open_checkpoint(folder)


def test_the_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    folder = shard(tmp_path / "snapshots", "model.safetensors").rename(tmp_path / "revision")
    (tmp_path / "snapshots").mkdir()
    folder = folder.rename(tmp_path / "snapshots" / "0123abc")
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(os.path.join("..", "..", "blobs", str(number)))
    assert_whole(open_checkpoint(folder))
    assert_whole(open_checkpoint(folder / "model.safetensors.index.json"))


def test_the_digest_is_of_all_files(tmp_path: Path) -> None:
    folder = shard(tmp_path, "model.safetensors")
    digests = {open_checkpoint(folder).sha256()}
    for file in sorted(folder.iterdir()):
        before = file.read_bytes()
        file.write_bytes(before + b"\n" if file.suffix == ".json" else before.replace(b'"pt"', b'"pq"'))
        digests.add(open_checkpoint(folder).sha256())
        file.write_bytes(before)
    assert len(digests) == 5


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def run(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        replaced = change(index)
        write_index(path, index if replaced is None else replaced)

    return run


def renamed(name: Any) -> Callable[[Path], None]:
    """An index whose second shard has another name."""
    return edit(lambda index: index["weight_map"].update({"b.weight": name, "count": name}))


def outside(folder: Path) -> None:
    target = folder.parent / "outside.safetensors"
    (folder / SECOND).rename(target)
    (folder / SECOND).symlink_to(target)


def folder_outside(folder: Path) -> None:
    """A link within the folder to a link that leaves it."""
    outside(folder)
    (folder / SECOND).rename(folder / "link")
    (folder / SECOND).symlink_to("link")


def subfolder_outside(folder: Path) -> None:
    """A subfolder that is a link."""
    (folder.parent / "elsewhere").mkdir()
    (folder / SECOND).rename(folder.parent / "elsewhere" / "x.safetensors")
    (folder / "sub").symlink_to(folder.parent / "elsewhere")
    renamed("sub/x.safetensors")(folder)


def pickled(folder: Path) -> None:
    torch.save(HALVES[1], folder / SECOND)


def both(folder: Path) -> None:
    save_file({**HALVES[1], "a.weight": WHOLE["a.weight"]}, folder / SECOND)


def swapped(folder: Path) -> None:
    (folder / FIRST).rename(folder / "x")
    (folder / SECOND).rename(folder / FIRST)
    (folder / "x").rename(folder / SECOND)


def lfs(folder: Path) -> None:
    (folder / SECOND).write_text("version https://git-lfs.github.com/spec/v1\n")


LISTED = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
INDEX = r"model\.safetensors\.index\.json: "
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "parent": (renamed("../x.safetensors"), INDEX + r"needs \.\./x\.safetensors, which is no file beside it"),
    "absolute": (renamed("/etc/passwd"), INDEX + "needs /etc/passwd, which is no"),
    "above a subfolder": (
        renamed("sub/../../x.safetensors"),
        INDEX + r"needs sub/\.\./\.\./x\.saf",
    ),
    "a folder": (renamed("sub//x.safetensors"), INDEX + r"needs sub//x\.safetensors, which is no file beside it"),
    "no such subfolder": (renamed("sub/x.safetensors"), INDEX + r"needs sub/x\.safetensors, which is missing"),
    "link out of a subfolder": (subfolder_outside, INDEX + r"needs sub/x\.safetensors, a link that leaves the folder"),
    "backslashes": (renamed("..\\x.safetensors"), INDEX + r"needs \.\.\\x\.safetensors, which is no file beside it"),
    "drive": (renamed("C:x.safetensors"), INDEX + r"needs C:x\.safetensors, which is no file beside it"),
    "URL": (renamed("https://x.safetensors"), INDEX + r"needs https://x\.safetensors, which is no file beside it"),
    "NUL": (renamed("x\0.safetensors"), INDEX + r"needs x\\x00\.safetensors, which is no file beside it"),
    "escape codes": (renamed("\x1b[31m//.safetensors"), INDEX + r"needs \\x1b\[31m//\.safetensors, which is no"),
    "the folder": (renamed("."), INDEX + r"needs \., which is no (file beside it|safetensors file)"),
    "no name": (renamed(3), INDEX + "its weight_map holds 3"),
    "link": (outside, INDEX + f"needs {SECOND}, a link that leaves the folder; copy the file there"),
    "link to a link": (folder_outside, INDEX + f"needs {SECOND}, a link that leaves the folder"),
    "a pickle by name": (renamed("pytorch_model.bin"), INDEX + r"needs pytorch_model\.bin, which is no safetensors"),
    "a pickle by content": (pickled, f"{SECOND}: is not a safetensors file, which it should be"),
    "git-LFS pointer": (lfs, f"{SECOND}: is not a safetensors file, which it should be; fetch it again"),
    "missing shard": (lambda folder: (folder / SECOND).unlink(), INDEX + f"needs {SECOND}, which is missing; fetch it"),
    "in two shards": (both, INDEX + f"a.weight: is in two shards: {FIRST}, {SECOND}"),
    "swapped": (swapped, INDEX + f"[a-z.]+: is in {SECOND}, not in {FIRST}; are its shards of one version"),
    "absent": (
        edit(lambda index: index["weight_map"].update(ghost=FIRST)),
        INDEX + f"ghost: is not in {FIRST}; are its shards of one version",
    ),
    "unlisted": (
        edit(lambda index: index["weight_map"].pop("count") and None),
        INDEX + f"count: is in {SECOND}, but not in the weight_map",
    ),
    "total_size": (
        edit(lambda index: index["metadata"].update(total_size=SIZE - 1)),
        INDEX + f"its total_size is {SIZE - 1}, but its tensors take {SIZE} bytes",
    ),
    "total_size is text": (
        edit(lambda index: index["metadata"].update(total_size="\x1b")),
        INDEX + r"its total_size is \\x1b, but its tensors take",
    ),
    "twice in the map": (edit(lambda index: LISTED), INDEX + "it is not valid JSON with distinct names"),
    "no map": (edit(lambda index: {"metadata": {}}), INDEX + "has no weight_map"),
    "map is a list": (edit(lambda index: {"weight_map": ["a"]}), INDEX + "has no weight_map"),
    "empty map": (edit(lambda index: {"weight_map": {}}), INDEX + "has no weight_map"),
    "metadata is a list": (edit(lambda index: {**index, "metadata": [1]}), INDEX + "has no weight_map"),
    "no JSON": (edit(lambda index: "{nonsense"), INDEX + "it is not valid JSON"),
    "deep": (edit(lambda index: '{"weight_map":' * 100_000), INDEX + "it is nested too deeply"),
    "config": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json: it is not valid JSON"),
    "long config": (lambda folder: (folder / "config.json").write_text(" " * 1_000_001), r"config\.json: takes more t"),
}


@pytest.mark.parametrize(("break_it", "words"), FAULTS.values(), ids=FAULTS)
def test_faults(break_it: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    folder = shard(tmp_path / "model", "model.safetensors")
    break_it(folder)
    with pytest.raises(CheckpointError, match=rf"^[^\n]*{words}[^\n]*$") as caught:
        open_checkpoint(folder)
    assert str(caught.value).isprintable()


def test_several_unusual_names_are_not_guessed_between(tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        save_file(WHOLE, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds several files of weights: a\.safetensors, b\.safetensors; name"):
        open_checkpoint(tmp_path)


def test_a_safetensors_index_may_name_no_pickle_whatever_the_index_is_called(tmp_path: Path) -> None:
    folder = shard(tmp_path, "pytorch_model.bin")
    (folder / "pytorch_model.bin.index.json").rename(folder / "model.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"needs pytorch_model-00001-of-00002\.bin, which is no safetensors file"):
        open_checkpoint(folder)


def test_an_index_by_another_name_is_known_by_its_content(tmp_path: Path) -> None:
    folder = shard(tmp_path, "model.safetensors")
    path = (folder / "model.safetensors.index.json").rename(folder / "weights.json")
    assert_whole(open_checkpoint(path))
