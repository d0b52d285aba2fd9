"""A dossier: the three documents of a verified folder, read and checked, for the reports that are made of them.

    conversion.json     what was converted, and where every tensor comes from
    config.json         what timm will build, and how its images are prepared
    verification.json   whether the two models are the same function

A key that an older or shorter document lacks has its empty value here; one of another type is an error.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from converters.errors import CheckpointError, printable

__all__ = [
    "Comparison",
    "Config",
    "Conversion",
    "Dossier",
    "Finding",
    "Mutant",
    "Mutants",
    "Origin",
    "Reference",
    "Rounding",
    "Source",
    "Tap",
    "Target",
    "Unchecked",
    "Undetectable",
    "Verification",
    "figure",
    "read_dossier",
]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class Comparison(_Part):
    """One output of one probe; a sample's error is None where it is no finite number."""

    output: str
    probe: str
    precision: str
    passed: bool
    reason: str | None = None
    sample_errors: tuple[float | None, ...] = ()
    bounds: tuple[float | None, ...] = ()
    information: dict[str, float | None] = {}

    @property
    def worst(self) -> tuple[float | None, float | None]:
        """The error that comes nearest to its bound, or goes furthest beyond it, and that bound."""
        pairs = zip(self.sample_errors, self.bounds, strict=False)
        return max(pairs, key=lambda pair: _share(*pair), default=(None, None))


class Tap(_Part):
    """A pair of modules on one probe: how far their outputs differ, and how far they do on the same input."""

    source: str
    target: str
    line: int | None = None
    probe: str
    depth: int
    error: float | None = None
    local_error: float | None = None
    bound: float | None = None
    local_bound: float | None = None
    passed: bool
    local_passed: bool | None = None
    reason: str | None = None
    channels: tuple[float | None, ...] = ()


class Finding(_Part):
    """An attribute that paired modules declare differently."""

    attribute: str
    kind: str
    source_value: Any = None
    target_value: Any = None
    modules: tuple[str, ...] = ()
    declared: str | None = None


class Mutant(_Part):
    """A deliberate fault, and whether the verification saw it."""

    kind: str
    tensor: str | None = None
    detail: str | None = None
    error: float | None = None
    margin: float | None = None
    detected: bool


class Undetectable(_Part):
    """A draw that damaged nothing, and why."""

    kind: str
    tensor: str = ""
    detail: str = ""
    reason: str = ""


class Mutants(_Part):
    """What became of every mutant."""

    seed: int = 0
    smallest_margin: float | None = None
    undetected: int = 0
    mutants: tuple[Mutant, ...] = ()
    undetectable: tuple[Undetectable, ...] = ()


class Source(_Part):
    """The checkpoint that was converted."""

    name: str = ""
    format: str | None = None
    writer: str | None = None
    bytes: int | None = None
    sha256: str = ""


class Target(_Part):
    """The timm model that it became."""

    architecture: str = ""
    args: dict[str, Any] = {}


class Origin(_Part):
    """Where a tensor of the target comes from: sources and ops, or a constant."""

    sources: tuple[str, ...] = Field((), alias="from")
    ops: str = ""
    line: int | None = None
    part: tuple[int, int] = (0, 1)  # which of the parts that the ops make, from 0, and how many those are
    fill: float | str | None = None  # a value, or a formula's name


class Conversion(_Part):
    """conversion.json."""

    source: Source = Source()
    wrappers: tuple[str, ...] = ()
    family: str = ""
    family_sha256: str = ""
    target: Target = Target()
    dtype: str = "source"
    caveats: tuple[str, ...] = ()
    tensors: dict[str, Origin] = {}
    drops: dict[str, str] = {}
    set_aside: dict[str, str] = {}
    preprocess: dict[str, Any] = {}  # what the source declares
    versions: dict[str, str] = {}


class Config(_Part):
    """config.json."""

    architecture: str = ""
    pretrained_cfg: dict[str, Any] = {}


class Reference(_Part):
    """Who answered for the source."""

    runner: str | None = None
    framework: dict[str, str] = {}


class Unchecked(_Part):
    """A pair of modules that could not be compared, and why."""

    source: str
    target: str
    line: int | None = None
    reason: str = ""


class Rounding(_Part):
    """Whether narrower weights are the source's, rounded once."""

    passed: bool
    dtype: str
    tensors: int
    wrong: tuple[str, ...] = ()


class Verification(_Part):
    """verification.json."""

    outcome: Literal["passed", "failed", "unproven"]
    summary: str
    warnings: tuple[str, ...] = ()
    reference: Reference = Reference()
    target: dict[str, str] = {}
    comparisons: tuple[Comparison, ...] = ()
    taps: tuple[Tap, ...] = ()
    unchecked: tuple[Unchecked, ...] = ()
    first_divergence: Tap | None = None
    culprit: str | None = None
    audit: tuple[Finding, ...] = ()
    rounding: Rounding | None = None
    mutants: Mutants | None = None


@dataclass(frozen=True)
class Dossier:
    """What is known of a folder that was verified."""

    name: str  # of the folder
    conversion: Conversion
    config: Config
    verification: Verification


Part = TypeVar("Part", bound=_Part)


def read_dossier(directory: str | os.PathLike[str]) -> Dossier:
    """The documents in `directory`. Raises CheckpointError when one is absent or is not what it should be."""
    folder = Path(directory)
    return Dossier(
        folder.resolve().name,
        _read(folder / "conversion.json", Conversion),
        _read(folder / "config.json", Config),
        _read(folder / "verification.json", Verification),
    )


def figure(value: float | None) -> str:
    """An error or a bound as text.

    >>> [figure(value) for value in (2.26e-15, 0.0, float("nan"), float("-inf"), None)]
    ['2.3e-15', '0', 'NaN', 'infinite', 'not finite']
    """
    if value is None:
        return "not finite"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "infinite"
    return f"{value:.1e}" if value else "0"


def _read(path: Path, kind: type[Part]) -> Part:
    try:
        return kind.model_validate(json.loads(path.read_text("utf-8")))
    except OSError as error:
        problem = f"cannot be read: {(error.strerror or str(error)).lower()}"
        raise CheckpointError(problem, file=path, cure="verify the folder first") from error
    except ValidationError as error:
        fault = error.errors()[0]
        where = printable(".".join(map(str, fault["loc"])))
        raise CheckpointError(f"is not as timmport writes it: {where}: {fault['msg'].lower()}", file=path) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError("is not JSON", file=path) from error


def _share(error: float | None, bound: float | None) -> float:
    """An error as a share of its bound; more than any where either is no number."""
    if error is None or bound is None or not math.isfinite(error) or not math.isfinite(bound):
        return math.inf
    if bound <= 0:
        return math.inf if error else 0.0
    return error / bound
