"""What lies beside the weights: config.json in timm's own form, conversion.json, and a model card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from converters.card import write_card
from converters.detection import reference_of
from converters.errors import CheckpointError
from converters.mapping import Mapping as Family
from converters.mapping import find_mappings
from converters.names import split
from converters.ops import Pipeline
from converters.plan import Plan
from converters.readers import Checkpoint
from converters.routes import route
from converters.schema import ReferenceFile
from converters.target import Skeleton
from converters.tensors import to_torch
from converters.values import filled
from converters.verifier.taps import Pair, pair_modules

__all__ = ["describe", "fill_reference", "write_description"]

_SOMEBODY_ELSES = ("tag", "license", "origin_url", "paper_name", "paper_ids", "notes", "url", "hf_hub_id", "file")


def describe(
    plan: Plan,
    checkpoint: Checkpoint,
    *,
    dtype: str = "source",
    img_size: int | list[int] | None = None,
    key: str | None = None,
    ema: bool | None = None,
    license: str | None = None,
) -> dict[str, Any]:
    """The content of conversion.json: where everything comes from. No time, host or path, so that runs agree.

    `key` and `ema` are what the checkpoint was opened with; `license` is the user's word for the weights'.
    """
    mapping, skeleton = plan.mapping, plan.skeleton
    return {
        "conversion": 1,
        "source": {
            "name": checkpoint.path.name,
            **({"url": checkpoint.url} if checkpoint.url else {}),
            "format": checkpoint.format,
            "writer": checkpoint.writer,
            "integrity": checkpoint.integrity,
            "bytes": sum(file.size for file in checkpoint.files),
            "key": key,
            "ema": ema,
        },
        "wrappers": list(checkpoint.wrappers),
        "family": mapping.name if mapping.name in find_mappings() else mapping.path.name,
        "family_sha256": hashlib.sha256(mapping.path.read_bytes()).hexdigest(),
        "target": {"architecture": skeleton.architecture, "args": skeleton.args},
        "dtype": dtype,
        "input_size": _input_size(plan, plan.skeleton, img_size),
        "preprocess": _constants(plan, checkpoint),
        "license": license,
        "label_names": _label_names(plan, checkpoint.metadata),
        "reference": _reference(plan, checkpoint, img_size),
        "changes": [asdict(change) for change in plan.changes],
        "caveats": [*plan.caveats, *checkpoint.notes],
        "deviation": _deviations(plan),
        "tensors": {
            step.target.name: {"fill": step.origin.fill}
            if step.origin.fill is not None
            else {
                "from": list(step.origin.sources),
                "ops": step.origin.ops.text,
                "line": step.origin.rule.line if step.origin.rule else None,
                **({"part": [step.part, step.origin.parts]} if step.origin.parts > 1 else {}),
            }
            for step in sorted(plan.steps, key=lambda step: step.target.name)
        },
        "modules": {pair.target: pair.to_json() for pair in _pairs(plan, checkpoint)},
        "drops": {name: drop.reason for name, drop in sorted(plan.drops.items())},
        "set_aside": dict(sorted(checkpoint.set_aside.items())),
        "versions": {name: version(name) for name in ("timmport", "timm", "torch", "safetensors")},
    }


def write_description(plan: Plan, record: Mapping[str, Any], folder: Path) -> None:
    """config.json, conversion.json and README.md in `folder`."""
    _write_json(folder / "conversion.json", record)
    _write_config(plan, record, folder / "config.json")
    write_card(folder, record)


def _write_config(plan: Plan, record: Mapping[str, Any], path: Path) -> None:
    """timm's own writer, and then without what describes timm's own weights of this architecture."""
    from timm.models._hub import save_config_for_hf

    model = plan.skeleton.model
    channels, height, width = record["input_size"]
    preprocess = dict(record["preprocess"])
    for key in ("mean", "std"):
        values = list(preprocess.get(key, model.pretrained_cfg[key]))
        if channels == 1:
            values = [sum(values) / len(values)]
        preprocess[key] = [values[channel % len(values)] for channel in range(channels)]
    save_config_for_hf(
        model,
        str(path),
        model_args={**plan.skeleton.args, "num_classes": model.num_classes},
        data_config={**preprocess, "input_size": (channels, height, width)},
    )
    config = json.loads(path.read_text("utf-8"))
    for key in _SOMEBODY_ELSES:
        config["pretrained_cfg"].pop(key, None)
    if record["license"]:
        config["pretrained_cfg"]["license"] = record["license"]
    if record["label_names"]:
        config["label_names"] = record["label_names"]
    _write_json(path, config)


def _pairs(plan: Plan, checkpoint: Checkpoint) -> list[Pair]:
    """The modules whose outputs must agree; none where features were changed on request."""
    return [] if any(change.inside for change in plan.changes) else list(pair_modules(plan, checkpoint.specs))


def _constants(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    """The preprocessing, with the values of those constants that the source keeps as tensors."""
    found = {}
    for key, value in plan.preprocess.items():
        found[key] = _constant(value, plan, checkpoint) if isinstance(value, dict) else value
    return found


def _constant(value: dict[str, Any], plan: Plan, checkpoint: Checkpoint) -> Any:
    wanted = split(value["source"])
    name = next((name for name in checkpoint.tensors if plan.mapping.stripped(name) == wanted), None)
    if name is None:
        return value["default"]
    tensor = checkpoint.tensors[name]
    own = to_torch(tensor.read(), tensor.spec).double().flatten()
    unless = value.get("unless")
    if unless and len(unless) == len(own) and (own - own.new_tensor(unless)).abs().max() < 1e-6:
        return unless
    (result,) = Pipeline.parse(value.get("ops", "")).run([own])
    if not result.isfinite().all():
        raise CheckpointError("is no constant of a preprocessing", file=checkpoint.path, tensor=name)
    return [round(one, 6) for one in result.tolist()]


def _label_names(plan: Plan, metadata: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes, where the file has as many as its model has classes."""
    names = _first_names(metadata, (plan.unchanged or plan.skeleton).model.num_classes)
    kept = next((change.classes for change in plan.changes if change.classes), None)
    if names is None or (kept is None and any(not change.inside for change in plan.changes)):
        return None
    return names if kept is None else [names[index] for index in kept]


def _first_names(value: Any, count: int, depth: int = 0) -> list[str] | None:
    """`classes`, `CLASSES`, `label_names` or `id2label`, wherever it stands."""
    if not isinstance(value, Mapping) or depth > 4 or not count:
        return None
    for key in ("classes", "CLASSES", "label_names", "id2label"):
        names = value.get(key)
        names = _numbered(names) if isinstance(names, Mapping) else names
        if isinstance(names, (list, tuple)) and len(names) == count and all(isinstance(name, str) for name in names):
            return list(names)
    return next((found for inner in value.values() if (found := _first_names(inner, count, depth + 1))), None)


def _numbered(names: Mapping[Any, Any]) -> list[Any]:
    """Names by their numbers, however a file has ordered them.

    >>> _numbered({"0": "cat", "10": "owl", "2": "dog"}), _numbered({"cat": "a"})
    (['cat', 'dog', 'owl'], ['a'])
    """
    numbers = {key: int(key) if str(key).isdecimal() else 0 for key in names}
    return [names[key] for key in sorted(names, key=numbers.__getitem__)]


def _input_size(plan: Plan, skeleton: Skeleton, img_size: int | list[int] | None) -> list[int]:
    """Channels, height and width."""
    size = list(plan.preprocess.get("input_size", skeleton.model.pretrained_cfg["input_size"]))
    size[0] = skeleton.args.get("in_chans", size[0])
    if given := img_size or skeleton.args.get("img_size"):
        size[1:] = [given, given] if isinstance(given, int) else list(given)
    return size


def _reference(plan: Plan, checkpoint: Checkpoint, img_size: int | list[int] | None) -> dict[str, Any] | None:
    """The reference of the source's own model, and those of its outputs that no change touches."""
    reference = reference_of(plan.mapping, checkpoint, route(plan.mapping, checkpoint.specs))
    if reference is None or any(change.inside for change in plan.changes):
        return None
    own = plan.unchanged or plan.skeleton
    block = fill_reference(reference, plan.mapping, own, _input_size(plan, own, img_size))
    if plan.changes:
        block["outputs"] = {name: theirs for name, theirs in block["outputs"].items() if name != "logits"}
    if plan.bgr:
        block["input"] = "flip 1"
    return block if block["outputs"] else None


def fill_reference(reference: ReferenceFile, family: Family, target: Skeleton, size: list[int]) -> dict[str, Any]:
    """A mapping's reference with every `$name` put in; `size` is that of the input (channels, height, width).

    `any_size` tells whether both models take images of other sizes too.
    """
    values = {
        "num_classes": target.model.num_classes,
        "num_features": target.model.num_features,
        "in_chans": size[0],
        "img_size": size[1],
        **family.targets.get(target.architecture, {}),
    }
    fixed = target.model.pretrained_cfg.get("fixed_input_size") or '"$img_size"' in json.dumps(reference.model)
    return {
        "runner": reference.runner,
        "model": filled(reference.model, values),
        "outputs": reference.outputs,
        **({"mend": reference.mend} if reference.mend else {}),
        "any_size": reference.any_size and not fixed,
    }


def _deviations(plan: Plan) -> list[dict[str, Any]]:
    """The mapping's deviations that this target has, each with its modules."""
    if not plan.mapping.deviation:
        return []
    modules = [name for name, _ in plan.skeleton.model.named_modules() if name]
    found = []
    for pattern, deviation in plan.mapping.deviation:
        matches = ((name, pattern.match(split(name))) for name in modules)
        if where := [name for name, match in matches if match and not match.rest]:
            found.append({**deviation.model_dump(), "where": where})
    return found


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, allow_nan=False) + "\n", "utf-8")
