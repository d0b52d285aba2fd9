"""DeepSpeed folders: what ZeRO saves at stages 1 and 2, where every process holds all weights in 16 bits.

`latest` names the folder in which `mp_rank_00_model_states.pt` holds the module's state dict, and each process's
`*_optim_states.pt` its part of the float32 weights: they are flattened one after the other in the order of
`param_shapes`, padded, and cut evenly. The float32 weights are read where all parts are there. At stage 3 the
module itself is cut, and DeepSpeed's own script has to put it together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.errors import CheckpointError, DamagedCheckpoint
from converters.readers import Contents
from converters.readers.files import SourceFile
from converters.readers.folders import find_beside
from converters.readers.torch.storages import View, are_sizes
from converters.readers.torch.trees import build_tree, open_tensor
from converters.readers.torch.zip_file import Pickled
from converters.readers.zip_archive import ZipArchive
from converters.tensors import LazyTensor, TensorSpec

__all__ = ["FORMAT", "accepts", "read"]

FORMAT = "DeepSpeed folder"
MODEL, OPTIMIZER = "*_model_states.pt", "*_optim_states.pt"
MERGE = "run its zero_to_fp32.py, which puts the weights together"


def accepts(path: Path, head: bytes) -> bool:
    return path.is_dir() and (any(path.glob(MODEL)) or ((path / "latest").is_file() and any(path.glob(f"*/{MODEL}"))))


def read(path: Path) -> Contents:
    latest = None if any(path.glob(MODEL)) else SourceFile(path / "latest")
    folder = path
    if latest:
        name = bytes(latest.read(0, min(latest.size, 1000))).decode("utf-8", "backslashreplace").strip()
        folder = find_beside(latest.path, name)
    models = sorted(folder.glob(MODEL))
    if not models:
        raise CheckpointError("holds no *_model_states.pt", file=folder, cure="fetch the whole folder")
    if any(model.name.startswith("zero_pp_rank") for model in models):
        raise CheckpointError("is of ZeRO stage 3, which cuts every weight into parts", file=folder, cure=MERGE)
    if [model.name for model in models] != ["mp_rank_00_model_states.pt"]:
        problem = f"is cut over {len(models)} files by model or expert parallelism"
        raise CheckpointError(problem, file=folder, cure="save the whole state dict")
    state = _open(models[0])
    tree = build_tree(state.value, models[0], open_tensor(state.find))
    module = tree.get("module")
    if not isinstance(module, dict):
        raise CheckpointError("holds no module", file=models[0], cure="save the whole state dict")
    parts = [_open(file) for file in sorted(folder.glob(OPTIMIZER), key=_numbers)]
    weights, note = module, ""
    if parts:
        masters = dict(_merge(state, parts))
        weights = _replace(module, masters, state)
        left = sum(name not in masters for name in weights)
        note = (
            f"{len(masters)} weights are float32, from {len(parts)} optimizer parts; {left} are as the module has them"
        )
    elif any(tensor.spec.dtype != "float32" for tensor in module.values() if _is_floating(tensor)):
        note = "the float32 weights are not there; these are the module's copies"
    files = [*([latest] if latest else []), *(one.archive.file for one in (state, *parts))]
    version = tree.get("ds_version")
    return Contents(
        tree={**tree, "module": weights},
        files=tuple(file for file in files if isinstance(file, SourceFile)),
        integrity="; ".join(dict.fromkeys(one.integrity for one in (state, *parts))),
        writer=f"DeepSpeed {version}" if isinstance(version, str) else None,
        notes=(note,) if note else (),
    )


def _open(path: Path) -> Pickled:
    pickled = Pickled(ZipArchive.open(SourceFile(find_beside(path, path.name))))
    if not isinstance(pickled.value, dict):
        raise CheckpointError("is not a dict, as DeepSpeed saves", file=path)
    return pickled


def _is_floating(value: Any) -> bool:
    return isinstance(value, LazyTensor) and "float" in value.spec.dtype


def _numbers(path: Path) -> list[int]:
    """The ranks in a file's name, to sort by."""
    return [int(digits) for digits in re.findall(r"\d{1,9}", path.name)]


def _merge(state: Pickled, parts: Sequence[Pickled]) -> Iterator[tuple[str, LazyTensor]]:
    """Every trained weight, in pieces of the parts that hold it."""
    path = state.archive.file.path
    try:
        shapes = state.value["param_shapes"]
        ranks = [_partition(part, len(parts)) for part in parts]
        for group, *views in zip(shapes, *ranks, strict=True):
            pieces = list(zip(parts, views, strict=True))
            total, at = sum(view.shape[0] for _, view in pieces), 0
            for name, shape in group.items():
                spec = TensorSpec(name, tuple(shape), "float32")
                if not are_sizes(shape):
                    raise ValueError
                yield name, _gather(spec, at, pieces)
                at += spec.numel
            step = 2 * len(parts)  # parts are padded to a multiple of this
            if math.ceil(at / step) != math.ceil(total / step):
                problem = f"its weights take {at} elements, but the parts hold {total}"
                raise DamagedCheckpoint(problem, file=path, cure="are all parts of one step there?")
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise DamagedCheckpoint("its param_shapes make no sense", file=path, cure=MERGE) from error


def _partition(part: Pickled, count: int) -> list[View]:
    """One process's flat float32 weights, one tensor for each group. Raises ValueError and its like for nonsense."""
    path, state = part.archive.file.path, part.value["optimizer_state_dict"]
    stage, counts = state["zero_stage"], state["partition_count"]
    counts = counts if isinstance(counts, list) else [counts]
    if stage not in (1, 2):
        raise CheckpointError(f"is of ZeRO stage {int(stage)}", file=path, cure=MERGE)
    if any(one != count for one in counts):
        expected = " or ".join(str(int(one)) for one in sorted(set(counts)))
        raise DamagedCheckpoint(f"is one of {expected} parts, but {count} are there", file=path, cure="fetch them all")
    groups = state["single_partition_of_fp32_groups"]
    if not all(isinstance(view, View) and view.dtype == "float32" and len(view.shape) == 1 for view in groups):
        raise ValueError
    return list(groups)


@dataclass(frozen=True)
class _Pieces:
    """The way to a weight's bytes; reads them part by part."""

    tensors: list[LazyTensor]

    def __call__(self) -> memoryview:
        if len(self.tensors) == 1:
            return self.tensors[0].read()
        return memoryview(bytearray().join(tensor.read() for tensor in self.tensors))


def _gather(spec: TensorSpec, at: int, pieces: Sequence[tuple[Pickled, View]]) -> LazyTensor:
    """The weight that begins `at` elements into all parts laid end to end."""
    found, end, start = [], at + spec.numel, 0
    for part, view in pieces:
        low, high = max(at, start), min(end, start + view.shape[0])
        if low < high:
            piece = replace(view, offset=view.offset + low - start, shape=(high - low,))
            tensor = piece.open(spec.name, part.find(view.storage, spec.name))
            if isinstance(tensor, LazyTensor):
                found.append(tensor)
        start += view.shape[0]
    if sum(tensor.spec.numel for tensor in found) != spec.numel:
        path = pieces[0][0].archive.file.path
        raise DamagedCheckpoint("its float32 parts are too short", file=path, tensor=spec.name, cure="fetch them all")
    return LazyTensor(spec, _Pieces(found))


def _replace(module: dict[str, Any], masters: dict[str, LazyTensor], state: Pickled) -> dict[str, Any]:
    """The module's state dict with the float32 weights in it; what shares a weight's memory gets it too."""
    path = state.archive.file.path
    shared = state.value.get("shared_params")
    for name, source in shared.items() if isinstance(shared, dict) else ():
        if source in masters and isinstance(name, str):
            masters[name] = masters[source]
    for name, tensor in masters.items():
        own = module.get(name)
        if not isinstance(own, LazyTensor) or own.spec.shape != tensor.spec.shape:
            problem = f"has the shape {tensor.spec.shape} in param_shapes, but not in the module"
            raise DamagedCheckpoint(problem, file=path, tensor=str(name), cure=MERGE)
    return {name: masters.get(name, value) for name, value in module.items()}
