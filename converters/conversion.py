"""The flow: open a checkpoint, find a plan that closes, emit it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from converters.errors import CheckpointError, NotExpressible, OutputError, PlanError
from converters.readers import Checkpoint, open_checkpoint
from converters.readers.files import is_url

if TYPE_CHECKING:
    from converters.changes import Ways
    from converters.detection import Nearest
    from converters.plan import Plan
    from converters.verifier.subject import Subject

__all__ = ["Conversion", "Inspection", "convert", "inspect", "plan_subject"]

Progress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class Conversion:
    """What `convert` did, or with `dry_run` would do."""

    checkpoint: Checkpoint
    plan: Plan
    directory: Path | None  # None after a dry run
    record: dict[str, Any]  # what conversion.json holds


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is."""

    checkpoint: Checkpoint
    plan: Plan | None  # if one closes
    reason: str = ""  # why none does
    nearest: Nearest | None = None  # what it resembles, where none does


def convert(
    source: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    family: str | None = None,
    target: str | None = None,
    args: Mapping[str, Any] | None = None,
    key: str | None = None,
    ema: bool | None = None,
    img_size: int | list[int] | None = None,
    ways: Ways | None = None,
    purpose: str = "model",
    license: str | None = None,
    dtype: str = "source",
    expect_sha256: str | None = None,
    dry_run: bool = False,
    overwrite: bool = False,
    allow_deviation: bool = False,
    allow_nan: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a checkpoint into a folder that `timm.create_model('local-dir:DIRECTORY', pretrained=True)` loads.

    `family` (a name, or a file) and `target` (a timm model) are found where they are not given; `args` are
    timm's, on top of the mapping's own; `img_size` in pixels, or height and width. Other sizes than the source's
    (`num_classes`, `in_chans`, `img_size`, `window_size`, `patch_size`) are changes, made in these `ways`.
    `purpose` is "model", "features" (the names of a `features_only=True` model) or "deployment" (branches fused).
    `license` is for the model card. Without `allow_deviation` a family that timm computes only nearly is refused,
    and without `allow_nan` a checkpoint with NaN, infinity or variances below zero.
    Raises ConverterError; then nothing is left at `directory`.
    """
    checkpoint = open_checkpoint(_fetch(source, progress) if not dry_run or expect_sha256 else source, key=key, ema=ema)
    wanted = not dry_run or expect_sha256
    digest = _begin(checkpoint.sha256) if wanted else None  # while timm is imported
    from converters.deployment import fold_batch_norms, fuse_branches
    from converters.description import describe, write_description
    from converters.detection import find_plan
    from converters.emitter import write_tensors
    from converters.features import only_features
    from converters.folders import new_folder

    plan = find_plan(checkpoint, family=family, target=target, args=args, img_size=img_size, ways=ways)
    plan = fold_batch_norms(plan) if ways and ways.fold_batch_norms else plan
    plan = {"model": lambda one: one, "features": only_features, "deployment": fuse_branches}[purpose](plan)
    record = describe(plan, checkpoint, dtype=dtype, img_size=img_size, key=key, ema=ema, license=license)
    if digest and expect_sha256 and expect_sha256.lower() != digest.result():
        raise CheckpointError(f"has the SHA-256 {digest.result()}, not the expected one", file=checkpoint.path)
    if dry_run or digest is None:
        return Conversion(checkpoint, plan, None, record)
    if any(file.path.resolve().is_relative_to(Path(directory).resolve()) for file in checkpoint.files):
        raise OutputError("holds the source itself", file=directory, cure="choose another name")
    if record["deviation"] and not allow_deviation:
        reasons = "; ".join(f"{one['reason']} (within {one['bound']:g})" for one in record["deviation"])
        problem = f"is of {plan.mapping.name}, which timm computes only nearly: {reasons}"
        raise NotExpressible(problem, file=checkpoint.path, cure="pass --allow-deviation to have it so")
    with new_folder(Path(directory), overwrite) as folder:
        write_tensors(
            plan, checkpoint, folder / "model.safetensors", dtype=dtype, allow_nan=allow_nan, progress=progress
        )
        record["source"]["sha256"] = digest.result()
        write_description(plan, record, folder)
    return Conversion(checkpoint, plan, Path(directory), record)


def _begin(work: Callable[[], str]) -> Future[str]:
    """Work in the background, for which nobody waits who does not want the result: an error is told at once."""
    future: Future[str] = Future()

    def do() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=do, daemon=True).start()
    return future


def _fetch(source: str | os.PathLike[str], progress: Progress | None) -> str | os.PathLike[str]:
    """A source that lies elsewhere, brought here whole; any other as it is."""
    if not is_url(source):
        return source
    from converters.readers.remote import fetch

    return fetch(os.fspath(source), progress)


def plan_subject(
    source: str | os.PathLike[str],
    *,
    family: str | None = None,
    target: str | None = None,
    args: Mapping[str, Any] | None = None,
    key: str | None = None,
    ema: bool | None = None,
    img_size: int | None = None,
) -> Subject:
    """What there would be to verify, had `source` been converted; the arguments are those of `convert`."""
    from converters.verifier.subject import make_subject

    ways: dict[str, Any] = {"key": key, "ema": ema, "img_size": img_size, "dry_run": True}
    planned = convert(source, Path(), family=family, target=target, args=args, **ways)
    planned.record["source"]["sha256"] = planned.checkpoint.sha256()
    channels, height, width = planned.record["input_size"]
    return make_subject(
        Path(source), planned.record, (channels, height, width), planned.plan.skeleton.model.num_classes
    )


def inspect(source: str | os.PathLike[str], *, key: str | None = None, ema: bool | None = None) -> Inspection:
    """What a checkpoint is: its form, its tensors, and the timm model that it would become.

    Raises CheckpointError when it cannot be read.
    """
    checkpoint = open_checkpoint(source, key=key, ema=ema)
    from converters.detection import find_nearest, find_plan

    try:
        return Inspection(checkpoint, find_plan(checkpoint))
    except NotExpressible as error:
        return Inspection(checkpoint, None, str(error))
    except PlanError as error:
        return Inspection(checkpoint, None, str(error), find_nearest(checkpoint))
