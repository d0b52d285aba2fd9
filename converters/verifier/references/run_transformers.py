"""Reference runner for transformers.

`model` is {"folder": PATH} of a folder with a config.json, or {"config": {...}}, its content; `architecture` is the
class, where the config names none. The hub is never asked and no code but the library's own is run. Where the
checkpoint is a file as `save_pretrained` writes it, `from_pretrained` reads it; a state dict inside something else
is handed to it. Outputs: those of a model's ModelOutput by name ("logits", "last_hidden_state", "hidden_states.2")
or position, and those of its modules; see torch_models.py.
"""

from __future__ import annotations

import functools
import json
import os
import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from torch_models import answering, read_state

__all__ = ["build", "construct"]

LOCAL = {"local_files_only": True, "trust_remote_code": False}


def build(job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """The model with the checkpoint's weights."""
    kind, config = _read_config(job["model"])
    if job["source"].get("wrappers"):
        given = {"pretrained_model_name_or_path": None, "config": config, "state_dict": read_state(job)}
        model, about = kind.from_pretrained(**given, output_loading_info=True)
    else:
        with tempfile.TemporaryDirectory() as folder:
            safe = _lay_out(job["source"], folder)
            how = {"use_safetensors": safe, "weights_only": not job.get("trust", False), **LOCAL}
            model, about = kind.from_pretrained(folder, config=config, output_loading_info=True, **how)
    wrong = sorted(about["missing_keys"]) + [str(row[0]) for row in about["mismatched_keys"]]
    if wrong:
        raise ValueError(f"the checkpoint does not fill the model: it lacks {', '.join(wrong[:5])}")
    hidden = any(name.startswith("hidden_states") for name in job["outputs"])
    model.to(getattr(torch, precision)).eval()
    call = functools.partial(model, output_hidden_states=True) if hidden else model
    return answering(model, job["outputs"], call), {"unexpected": sorted(about["unexpected_keys"])}


def construct(job: Mapping[str, Any]) -> torch.nn.Module:
    """The model as its constructor leaves it."""
    kind, config = _read_config(job["model"])
    return kind(config)


def _read_config(model: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model's class and its config."""
    import transformers

    if "config" in model:
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                json.dump(model["config"], file)
            config = transformers.AutoConfig.from_pretrained(folder, **LOCAL)
    else:
        config = transformers.AutoConfig.from_pretrained(os.path.abspath(model["folder"]), **LOCAL)
    name = model.get("architecture") or next(iter(config.architectures or ()), None)
    kind = getattr(transformers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise ValueError(f"transformers has no model class {name!r}, which the config's `architectures` names")
    return kind, config


def _lay_out(source: Mapping[str, Any], folder: str) -> bool:
    """Put the checkpoint under the names that from_pretrained looks for; whether it is safetensors."""
    files = source.get("files") or [source["file"]]
    with open(next(path for path in files if not path.endswith(".json")), "rb") as file:
        safe = file.read(9)[8:] == b"{"
    single = "model.safetensors" if safe else "pytorch_model.bin"
    for path in files:
        os.symlink(os.path.abspath(path), os.path.join(folder, single if len(files) == 1 else os.path.basename(path)))
    return safe
