"""Closings: whether a mapping closes on the checkpoints that its references would write, by names and shapes alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from collections.abc import Mapping as Dict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.description import fill_reference
from converters.detection import find_plan, reference_of
from converters.errors import ConverterError, NotExpressible, PlanError, TargetError
from converters.mapping import Mapping, find_mappings
from converters.plan import Plan
from converters.readers import Checkpoint, open_checkpoint
from converters.routes import Route, route
from converters.schema import ReferenceFile
from converters.target import build_skeleton, traits_of
from converters.tensors import LazyTensor, TensorSpec
from converters.verifier.references.__main__ import RUNNERS
from converters.verifier.references.random_weights import AROUND
from converters.verifier.worker import run_task

__all__ = ["Closing", "Question", "Unbuilt", "ask", "build", "close", "place_of", "pose", "unaided"]

CLASSES = 10  # of every classifier here


@dataclass(frozen=True, eq=False)
class Question:
    """A reference to be built for a target."""

    target: str
    number: int  # of the reference
    block: Dict[str, Any]  # as conversion.json has it
    size: tuple[int, ...]  # of the input: channels, height, width
    img_size: int | None  # what was asked for, if it was heeded
    parameters: int
    rebuilt: bool = False  # for that size, where timm's own is another


@dataclass(frozen=True)
class Unbuilt:
    """A reference that cannot be built, and why."""

    reason: str
    installed: bool = True  # whether the framework is there


@dataclass(frozen=True)
class Closing:
    """What became of a reference's checkpoint."""

    question: Question
    outcome: str  # closes, open or refused
    detail: str
    prefix: str  # that the model lies under, so that the family is detected
    routes: tuple[Route, ...]
    plan: Plan | None
    checkpoint: Checkpoint  # names and shapes alone


def ask(mapping: Mapping, targets: Sequence[str], img_size: int | None) -> Iterator[Question]:
    """Every target, or these, with every reference; see `pose`."""
    for target in targets or mapping.targets:
        for number in range(len(mapping.references)):
            if question := pose(mapping, target, number, img_size):
                yield question


def pose(mapping: Mapping, target: str, number: int, img_size: int | None, *, rebuilt: bool = False) -> Question | None:
    """A target with one of the references; `img_size` is for models that take any size.

    Those that are built for one are built for it where `rebuilt` says so, if both sides can be.

    None where they cannot, where timm lacks the target, and where there is no such runner; the lint tells of it.
    """
    reference = mapping.references[number]
    if reference.runner not in RUNNERS or (rebuilt and '"$img_size"' not in json.dumps(reference.model)):
        return None
    try:
        traits = traits_of(target)  # these are the arguments that a plan reads off a checkpoint
        args: dict[str, Any] = {"num_classes": CLASSES} if traits.classifiers else {}
        args |= {"in_chans": traits.in_chans} if traits.first_convs else {}
        args |= {"img_size": img_size} if rebuilt else {}
        skeleton = build_skeleton(target, {**mapping.args_of(target, reference), **args})
    except TargetError:
        return None
    config = skeleton.model.pretrained_cfg
    own = mapping.preprocess.get("input_size")  # a family that says its size is true at that
    asked = img_size if rebuilt or not (own or config.get("fixed_input_size")) else None
    own = own or config["input_size"]
    size = [own[0], asked, asked] if asked else list(own)
    block = fill_reference(reference, mapping, skeleton, size)
    parameters = sum(spec.numel for spec in skeleton.specs.values())
    return Question(target, number, block, tuple(size), asked, parameters, rebuilt)


def build(questions: Sequence[Question], folder: Path, **ways: Any) -> dict[Question, Dict[str, TensorSpec] | Unbuilt]:
    """The tensors of every reference. A framework answers for all of its models at once.

    `ways` are those of `run_task`. Raises ReferenceFailed.
    """
    found: dict[Question, Dict[str, TensorSpec] | Unbuilt] = {}
    for module in dict.fromkeys(RUNNERS[question.block["runner"]] for question in questions):
        group = [question for question in questions if RUNNERS[question.block["runner"]] == module]
        models = [{"runner": one.block["runner"], "model": one.block["model"]} for one in group]
        job = {"task": "list_tensors", "runner": models[0]["runner"], "models": models, "folder": str(folder)}
        answers = run_task(job, **ways)["models"]
        found |= {question: _specs(answer) for question, answer in zip(group, answers, strict=True)}
    return {question: found[question] for question in questions}


def _specs(answer: Dict[str, Any]) -> Dict[str, TensorSpec] | Unbuilt:
    if "error" in answer:
        return Unbuilt(str(answer["error"]), installed=not answer["missing"])
    if "file" in answer:
        specs = open_checkpoint(answer["file"]).specs
        Path(answer["file"]).unlink()
        return specs
    return {name: TensorSpec(name, tuple(shape), dtype) for name, (shape, dtype) in answer["tensors"].items()}


def close(mapping: Mapping, question: Question, specs: Dict[str, TensorSpec]) -> Closing | None:
    """What the family makes of a checkpoint with these tensors; None where another of its references answers for it."""
    prefix, checkpoint = _as_saved(mapping, question, specs)
    routes = route(mapping, checkpoint.specs)
    if reference_of(mapping, checkpoint, routes) is not mapping.references[question.number]:
        return None
    plan, outcome, detail = None, "closes", ""
    try:
        plan = _detect(mapping, question.target, checkpoint)
    except NotExpressible as error:
        outcome, detail = "refused", str(error)
    except ConverterError as error:
        outcome, detail = "open", str(error)
    return Closing(question, outcome, detail, prefix, routes, plan, checkpoint)


def _detect(mapping: Mapping, target: str, checkpoint: Checkpoint) -> Plan:
    """The plan that is found without --family and --to, if it is the right one. Raises ConverterError."""
    try:
        found = find_plan(checkpoint, family=unaided(mapping))
    except ConverterError:
        find_plan(checkpoint, family=mapping.name, target=target)  # has a better reason, if any
        raise
    if (found.mapping.name, found.skeleton.architecture) == (mapping.name, target):
        return found
    find_plan(checkpoint, family=mapping.name, target=target)
    other = f"{found.skeleton.architecture} by {found.mapping.name}"
    raise PlanError(f"without --family and --to it is taken for {other}")


def unaided(mapping: Mapping) -> str | None:
    """The `family` to convert with: none for one that ships, which must be detected."""
    return None if mapping.name in find_mappings() else mapping.name


def place_of(mapping: Mapping, number: int) -> tuple[str | int, ...]:
    """Where a reference stands in the file."""
    return ("reference", number) if ("reference", number) in mapping.lines.by_path else ("reference",)


def _as_saved(mapping: Mapping, question: Question, specs: Dict[str, TensorSpec]) -> tuple[str, Checkpoint]:
    """The checkpoint, under a prefix that the mapping strips where the bare names are not the family's."""
    found = []
    for prefix in ("", *(f"{one.text}." for one in mapping.strip if not re.search(r"[*{]", one.text))):
        around = {name: TensorSpec(name, shape, "float32") for name, shape in AROUND.get(prefix, {}).items()}
        lying = around | {prefix + n: TensorSpec(prefix + n, s.shape, s.dtype) for n, s in specs.items()}
        tensors = {name: _unread(spec) for name, spec in lying.items()}
        said = {"cfg": re.sub(r"'(\w+)': ", r"\1=", repr(question.block["model"]))}
        found.append((prefix, Checkpoint(Path(question.target), "names and shapes", tensors, metadata=said)))
    found = [one for one in found if mapping.applies(one[1].specs)] or found[:1]
    own = (one for one in found if _reference(mapping, one[1]) is mapping.references[question.number])
    return next(own, found[0])


def _reference(mapping: Mapping, checkpoint: Checkpoint) -> ReferenceFile | None:
    return reference_of(mapping, checkpoint, route(mapping, checkpoint.specs))


def _unread(spec: TensorSpec) -> LazyTensor:
    def read() -> memoryview:
        raise AssertionError(f"{spec.name}: a plan reads nothing")

    return LazyTensor(spec, read)
