"""Hugging Face folders: weights in one file, or in shards that an index names, and `config.json` beside them.

The path of the folder or of the index is given. An index is JSON: `weight_map` says for every tensor which shard
holds it, beside the index or below, `metadata.total_size` how many bytes all take. Weights are a safetensors file's,
or torch.save's (in whose shards those that share memory may be counted once), and of older folders Flax's or Keras's.
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint, UnsafeCheckpoint, printable
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.folders import find_beside
from converters.readers.strict_json import parse_json
from converters.tensors import LazyTensor

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "Hugging Face folder"
INDEX = ".index.json"
STEMS = (
    *("model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.bin"),
    *("flax_model.msgpack", "tf_model.h5"),
)
WEIGHTS = tuple(f"{stem}{suffix}" for stem in STEMS for suffix in ("", INDEX))  # the first that is there, as there
KINDS = {  # ending: what such a file is, who reads it
    ".safetensors": ("safetensors", ("safetensors",)),
    ".msgpack": ("Flax msgpack", ("jax.flax",)),
    ".h5": ("Keras", ("keras.checkpoint",)),
}
TORCH = "torch.save", ("torch.zip_file", "torch.legacy")  # of any other ending
MAX_INDEX, MAX_CONFIG = 100_000_000, 1_000_000  # bytes


def accepts(path: Path, head: bytes) -> bool:
    """Whether this is an index, or a folder with weights under one of the usual names or safetensors of any."""
    if path.is_dir():
        return bool(_find_weights(path))
    return head.lstrip()[:1] == b"{" and (path.name.endswith(INDEX) or b'"weight_map"' in head)


def read(path: Path) -> Contents:
    weights = path
    if path.is_dir():
        weights, *others = _find_weights(path)
        if others:
            names = ", ".join(printable(one.name, 40) for one in (weights, *others[:9]))
            raise CheckpointError(f"holds several files of weights: {names}", file=path, cure="name one of them")
        find_beside(weights, weights.name)
    is_index = weights == path or weights.name.endswith(INDEX)
    contents = _read_shards(weights) if is_index else _reader_of(weights, weights.suffix).read(weights)
    if not weights.with_name("config.json").is_file():
        return contents
    config_file = SourceFile(find_beside(weights, "config.json"))
    config = _read_json(config_file, MAX_CONFIG)
    version = config.get("transformers_version")
    return replace(
        contents,
        tree={**contents.tree, "config.json": config},
        files=(*contents.files, config_file),
        writer=f"Transformers {printable(version, 40)}" if isinstance(version, str) else contents.writer,
    )


def _find_weights(folder: Path) -> list[Path]:
    usual = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    return usual[:1] or sorted(folder.glob(f"*.safetensors{INDEX}")) or sorted(folder.glob("*.safetensors"))


def _read_json(file: SourceFile, limit: int) -> dict[str, Any]:
    if file.size > limit:
        raise UnsafeCheckpoint(f"takes more than {limit:,} bytes", file=file.path)
    return parse_json(bytes(file.read(0, file.size)), file.path, "it")


def _reader_of(path: Path, ending: str) -> ModuleType:
    """The module that reads a file of weights, which must be of the kind that its name or index says."""
    file = SourceFile(path)
    head = bytes(file.read(0, min(4096, file.size)))
    kind, names = KINDS.get(ending, TORCH)
    for reader in (import_module(f"converters.readers.{name}") for name in names):
        if reader.accepts(path, head):
            return reader
    raise CheckpointError(f"is not a {kind} file, which it should be", file=path, cure="fetch it again")


def _read_shards(path: Path) -> Contents:
    """The tensors that an index lists: all of them, in the shards it says, and no others."""
    index_file = SourceFile(path)
    index = _read_json(index_file, MAX_INDEX)
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if not isinstance(weight_map, dict) or not weight_map or not isinstance(metadata, dict):
        raise DamagedCheckpoint("has no weight_map", file=path, cure="fetch it again")
    if stray := next((name for name in weight_map.values() if not isinstance(name, str)), None):
        raise DamagedCheckpoint(f"its weight_map holds {printable(str(stray), 40)}", file=path)
    shards = sorted(set(weight_map.values()))
    ending = next((one for one in KINDS if f"{one}{INDEX}" in path.name or shards[0].endswith(one)), "")
    if ending == ".h5":
        weight_map = {_keras_name(name): shard for name, shard in weight_map.items()}
    if stray := next((name for name in shards if not name.endswith(ending)), None):
        problem = f"needs {printable(stray, 80)}, which is no {KINDS[ending][0]} file, as others are"
        raise UnsafeCheckpoint(problem, file=path)
    paths = [find_beside(path, shard) for shard in shards]
    found = [_reader_of(shard, ending).read(shard) for shard in paths]
    tree, holders = _merge(shards, found, path)
    _check_map(weight_map, holders, path)
    total = metadata.get("total_size")
    nbytes = sum(value.spec.nbytes for value in tree.values() if isinstance(value, LazyTensor))
    if total is not None and not (total == nbytes or (not ending and _is_less(total, nbytes))):
        problem = f"its total_size is {printable(str(total), 40)}, but its tensors take {nbytes} bytes"
        raise DamagedCheckpoint(problem, file=path, cure="are its shards of one version?")
    return Contents(
        tree={**tree, "index": metadata},
        files=(index_file, *(file for contents in found for file in contents.files)),
        integrity="; ".join(dict.fromkeys(contents.integrity for contents in found)),
    )


def _keras_name(name: str) -> str:
    """What a TensorFlow shard's reader calls a variable of the index, which begins with its model.

    >>> _keras_name("tf_model/vit/encoder/layer_._0/dense/kernel:0")
    'vit/encoder/layer_._0/dense/kernel'
    """
    is_whole = "model." in name or "/" not in name  # the writer's own rule
    return (name if is_whole else name.partition("/")[2]).removesuffix(":0")


def _is_less(total: Any, nbytes: int) -> bool:
    return type(total) in (int, float) and 0 < total < nbytes


def _merge(shards: list[str], found: list[Contents], path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """All shards' entries in one tree, and which shard holds each tensor."""
    tree: dict[str, Any] = {}
    holders: dict[str, str] = {}
    for shard, contents in zip(shards, found, strict=True):
        for name, value in contents.tree.items():
            if isinstance(value, LazyTensor):
                if name in tree:
                    problem = f"is in two shards: {printable(holders.get(name, '?'), 80)}, {printable(shard, 80)}"
                    raise DamagedCheckpoint(problem, file=path, tensor=name)
                holders[name] = shard
            tree.setdefault(name, value)
    return tree, holders


def _check_map(weight_map: dict[str, str], holders: dict[str, str], path: Path) -> None:
    cure = "are its shards of one version?"
    for name, shard in weight_map.items():
        if name not in holders:
            raise DamagedCheckpoint(f"is not in {printable(shard, 80)}", file=path, tensor=name, cure=cure)
        if holders[name] != shard:
            problem = f"is in {printable(holders[name], 80)}, not in {printable(shard, 80)}"
            raise DamagedCheckpoint(problem, file=path, tensor=name, cure=cure)
    for name, shard in holders.items():
        if name not in weight_map:
            problem = f"is in {printable(shard, 80)}, but not in the weight_map"
            raise DamagedCheckpoint(problem, file=path, tensor=name, cure=cure)
