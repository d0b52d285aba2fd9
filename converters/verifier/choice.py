"""The choice of a reference: what `--reference` and its companions say, as a job for the worker.

    auto                    the model that the family's mapping names
    mmdet:CONFIG.py         the model of a config file, which is executed; mmpretrain and mmseg likewise
    keras:APPLICATION       a constructor of keras.applications
    keras:FILE              a saved model, which is executed: with --trust
    torchvision:NAME        a constructor of torchvision's
    transformers:FOLDER     the class and the sizes that the folder's config.json names
    timm:ARCHITECTURE       timm itself, of another release, with --python
    onnx:FILE               a graph, with weights of its own
    savedmodel:FOLDER       a graph, or a frozen one in a file, with weights of its own: with --trust
    python:MODULE:FACTORY   code of the user's own, which is executed; see references/run_python.py
    RECORDING.npz           what any of these gave elsewhere (which is no job)

`--output "forward_features=0 | b h w c -> b c h w"` says which of its outputs is which of timm's and how it is
laid out; else the first is the logits of a classifier, or the features of a model without classes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

from converters.errors import CheckpointError, ReferenceFailed, printable
from converters.ops import Pipeline
from converters.readers import Checkpoint, open_checkpoint
from converters.verifier.subject import Subject

__all__ = ["REFERENCES", "make_job", "open_source", "parse_reference", "read_outputs"]

REFERENCES = {  # runner: what follows its colon
    "mmdet": "CONFIG.py",
    "mmpretrain": "CONFIG.py",
    "mmseg": "CONFIG.py",
    "keras": "APPLICATION or FILE",
    "torchvision": "NAME",
    "transformers": "FOLDER",
    "timm": "ARCHITECTURE",
    "onnx": "FILE",
    "savedmodel": "FOLDER or GRAPH.pb",
    "flax": "MODULE:FACTORY",
    "tensorflow": "MODULE:FACTORY",
    "python": "MODULE:FACTORY",
}
OUTPUT = re.compile(r"logits|forward_features|pre_logits|features\.[0-9]{1,3}")
CHANNELS_LAST = ("flax", "keras", "savedmodel", "tensorflow")


def parse_reference(
    text: str,
    subject: Subject,
    outputs: Iterable[str] = (),
    args: Mapping[str, Any] | None = None,
    *,
    elsewhere: bool = False,
) -> dict[str, Any]:
    """What of the job chooses the reference: `runner`, `model` or `config`, `outputs`; see references/__main__.py.

    `outputs` are what --output says; `args` reach the constructor, or the table of a graph. `elsewhere` leaves
    paths as they are, for another machine. Raises ReferenceFailed.
    """
    block = subject.reference or {}
    if text == "auto":
        if not block:
            cure = "name one with --reference, or give a recording (.npz)"
            problem = f"the family {printable(subject.family)} names no reference"
            raise ReferenceFailed(problem, file=subject.directory, cure=cure)
        model = _with_args(block["model"], args or {})
        return {**block, "model": model, "outputs": read_outputs(outputs) or block["outputs"]}
    runner, _, name = text.partition(":")
    if runner not in REFERENCES or not name or (REFERENCES[runner].startswith("MODULE") and ":" not in name):
        kinds = ["auto", *(f"{runner}:{what}" for runner, what in REFERENCES.items()), "RECORDING.npz"]
        raise ReferenceFailed(f"{printable(text)} is no reference", cure=f"give one of {', '.join(kinds)}")
    job = {"runner": runner, **_model(runner, name, subject, args or {}, elsewhere)}
    own = block.get("runner", "")
    if own == runner or (own.startswith("mm") and runner.startswith("mm")):
        job = {**block, **job}  # what the mapping says of its own reference holds for another model of that framework
    if "outputs" not in job or (runner == "keras" and "file" in job["model"]):
        job["outputs"] = _first_output(runner, subject)
    return {**job, "outputs": read_outputs(outputs) or job["outputs"]}


def read_outputs(texts: Iterable[str]) -> dict[str, str]:
    """What --output says: timm's output, and the reference's with the ops that lay it out as timm's.

    >>> read_outputs(["logits=0", "features.3 = layer3 | b h w c -> b c h w"])
    {'logits': '0', 'features.3': 'layer3 | b h w c -> b c h w'}
    """
    found = {}
    for text in texts:
        name, _, rest = (part.strip() for part in text.partition("="))
        if not OUTPUT.fullmatch(name) or not rest.partition("|")[0].strip():
            cure = "write logits=0, or forward_features, pre_logits or features.K for logits, with ops behind a |"
            raise ReferenceFailed(f"--output {printable(text)} says of no output which it is", cure=cure)
        try:
            Pipeline.parse(rest.partition("|")[2])
        except ValueError as error:
            raise ReferenceFailed(f"--output {printable(text)}: {error}") from error
        found[name] = rest
    return found


def open_source(subject: Subject, path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint that `subject` was converted from, opened as it was. Raises CheckpointError if it is another."""
    checkpoint = open_checkpoint(path, key=subject.key, ema=subject.ema)
    sha256 = checkpoint.sha256()
    if sha256 != subject.sha256:
        problem = f"is not what was converted: its sha256 is {sha256[:12]}..., not {printable(subject.sha256[:12])}..."
        raise CheckpointError(problem, file=path, cure="give the original, or convert this one")
    return checkpoint


def make_job(reference: Mapping[str, Any], subject: Subject, checkpoint: Checkpoint, *, trust: bool) -> dict[str, Any]:
    """The whole job of what `parse_reference` gave: on these files, with every module that has a counterpart."""
    inputs, outputs = [pair.source for pair in subject.modules], [pair.output for pair in subject.modules]
    source = {
        "file": os.path.abspath(checkpoint.path),
        "files": [os.path.abspath(file.path) for file in checkpoint.files],
        "wrappers": list(checkpoint.wrappers),
        "chosen": subject.key is not None or subject.ema is not None,
    }
    taps = {"inputs": inputs, "outputs": list(dict.fromkeys(outputs))}
    return {**reference, "source": source, "trust": trust, "taps": taps}


def _model(runner: str, name: str, subject: Subject, args: Mapping[str, Any], elsewhere: bool) -> dict[str, Any]:
    """What the runner is to build: `model`, or `config`."""
    classes = {"num_classes": subject.num_classes} if subject.num_classes else {}
    channels, height, width = subject.input_size
    channel_args = {"in_chans": channels} if channels != 3 else {}

    def path() -> str:
        if elsewhere:
            return name
        if not os.path.exists(name):
            raise ReferenceFailed("is not there", file=name, cure=f"write {runner}:{REFERENCES[runner]}")
        return os.path.abspath(name)

    if runner.startswith("mm"):
        return {"model": None, "config": path()}
    if runner == "keras" and (name.endswith((".keras", ".h5", ".hdf5")) or os.path.exists(name)):
        named = subject.reference["model"] if subject.reference and subject.reference["runner"] == runner else {}
        return {"model": {**named, "file": path(), **args}}
    if runner == "keras":
        shape = {"input_shape": [height, width, channels], "weights": None}
        top = {"classes": subject.num_classes, "classifier_activation": None} if classes else {"include_top": False}
        return {"model": _with_args({"application": name, "args": {**shape, **top}}, args)}
    if runner == "torchvision":
        return {"model": {"name": name, "args": {**classes, **args}}}
    if runner == "timm":
        return {"model": {"architecture": name, "args": {"num_classes": subject.num_classes, **channel_args, **args}}}
    if REFERENCES[runner].startswith("MODULE"):
        module, _, factory = name.rpartition(":")
        module = os.path.abspath(module) if module.endswith(".py") and not elsewhere else module
        return {"model": {"module": module, "factory": factory, "args": dict(args)}}
    key = {"transformers": "folder", "onnx": "file", "savedmodel": "path"}[runner]
    return {"model": {key: path(), **args}}


def _with_args(model: Mapping[str, Any], args: Mapping[str, Any]) -> dict[str, Any]:
    return {**model, "args": {**model.get("args", {}), **args}} if args else dict(model)


def _first_output(runner: str, subject: Subject) -> dict[str, str]:
    if subject.num_classes:
        return {"logits": "logits" if runner == "keras" else "0"}
    return {"forward_features": "0 | b h w c -> b c h w" if runner in CHANNELS_LAST else "0"}
