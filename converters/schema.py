"""The schema of mapping files: which keys there are, and what may stand under them.

The command `timmport families --schema` prints it as JSON for editors.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from converters.strict_yaml import Lines

__all__ = [
    "ConstantFile",
    "Deviation",
    "DropFile",
    "Evidence",
    "FillFile",
    "MappingFile",
    "ReferenceFile",
    "Refusal",
    "RowFile",
    "When",
    "validate",
]

_SOME = Field(min_length=1)
Plain = bool | int | float | str


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class When(_Strict):
    """The guard of a row: all that it names must be there."""

    source: str | None = None  # a module or tensor of the checkpoint
    target: str | None = None  # a module or tensor of the timm model


class RowFile(_Strict):
    to: str
    when: When = When()


class Evidence(_Strict):
    """What a checkpoint shows of its origin: all that it names must be there."""

    source: str | list[str | list[str]] | None = None  # what `detect` would have, or one of these; a list: all
    metadata: str | list[str] | None = None  # this text, or one of these, in what the checkpoint says of itself
    without: str | None = None  # a text that is not there


class ReferenceFile(_Strict):
    """How to build the source framework's own model.

    `$name` stands for a value of the target's row, or for `$num_classes`, `$num_features`, `$in_chans` or
    `$img_size`; an entry whose `$name` has no value is left out.
    """

    runner: str
    model: dict[str, Any]
    outputs: dict[str, str]  # timm's output: the reference's, and an einops pattern where layouts differ
    any_size: bool = True  # whether it takes images of another size than timm's
    when: Evidence = Evidence()
    target_args: dict[str, Any] = {}  # what makes timm compute this reference's function
    mend: dict[str, str] = {}  # modules that its code calls again in the place of others: `{ln1: ln2}`
    preprocess: dict[str, Any] = {}  # where its published weights want other than the family's


class Refusal(_Strict):
    """Sources that look like the family and compute another function."""

    reason: str
    when: Evidence = Evidence()  # nothing: always
    unless: Evidence | None = None  # what proves that it is not so; without that proof the report carries the reason
    of: Literal["model", "logits"] = "model"  # logits: only the classifier, without which the source may be had


class DropFile(_Strict):
    """A source that may be dropped only if its values are what its place in timm would have."""

    reason: Annotated[str, _SOME]
    only: Annotated[
        str, _SOME
    ]  # "zeros", or timm's own buffer, and ops that lay it out or give each word on the left its part


class FillFile(_Strict):
    """A value for what the source does not have although timm computes with it; the report carries the reason."""

    value: int | float | str
    reason: Annotated[str, _SOME]


class Deviation(_Strict):
    """What timm cannot compute as the source does, and how far that may take the outputs away."""

    where: str  # timm's modules, as a pattern
    attribute: str
    source: Plain
    target: Plain
    bound: Annotated[float, Field(gt=0, lt=1)]  # in place of parity's own
    reason: Annotated[str, _SOME]


class ConstantFile(_Strict):
    """A constant of the preprocessing that the source keeps as a tensor."""

    source: str
    default: list[float]  # where there is no such tensor
    ops: str = ""
    unless: list[float] = []  # with these values no ops are run


class MappingFile(_Strict):
    """The schema of a mapping file."""

    targets: Annotated[dict[str, dict[str, Any] | None], _SOME] | Literal["any", "none"]  # none: all are refused
    detect: Annotated[list[str | Annotated[list[str], _SOME]], _SOME]  # all must hold; of an inner list, one
    # `like:` another layout, and some of its own, `Norm/beta` for one in a module that goes with it
    leaves: str | dict[str, str | Annotated[list[str], _SOME]] = "torch"
    rules: dict[str, str | RowFile | Annotated[list[str | RowFile], _SOME]] = {}
    target_args: dict[str, Any] = {}  # `$name` stands for a value of the target's row
    strip: str | list[str] = []
    renumber: list[str] = []  # what automatic names begin with; see numbering.py
    unstack: dict[str, str] = {}  # modules whose tensors are stacks: the name that layer {i} of them has for the rows
    ops: dict[str, str] = {}
    drop: dict[str, Annotated[str, _SOME] | DropFile] = {}
    fill: dict[str, int | float | str | FillFile] = {}  # a value, or the name of a formula: identity, sincos2d
    # a number, or a pattern of the source's modules: the target's, counted through; a list: in the target's order
    enumerate: dict[str, str | Annotated[list[str], _SOME]] = {}
    tables: dict[str, Annotated[dict[str, int], _SOME] | Annotated[dict[str, str], _SOME]] = {}
    # timm's settings, or `bgr: true`; here too `$name` stands for a value of the target's row
    preprocess: dict[str, ConstantFile | list[int] | list[float] | Plain] = {}
    reference: ReferenceFile | list[ReferenceFile] = []
    refuse: list[Refusal] = []
    caveat: str = ""  # what must be told although plans close
    taps: dict[str, str] = {}  # source module: whose output timm's has (or `none`), and ops that lay timm's out so
    deviation: list[Deviation] = []


def validate(data: Any, lines: Lines) -> MappingFile:
    """A mapping file's plain data, checked. Raises MappingError for the fault that says most."""
    try:
        return MappingFile.model_validate(data)
    except ValidationError as error:
        faults = [(_place(fault["loc"], data), fault) for fault in error.errors()]
        # the deepest, and there not that another member of a union wants another type
        place, fault = max(faults, key=lambda one: (len(one[0]), not one[1]["type"].endswith("_type")))
    what = ".".join(map(str, place)) or "the file"
    if fault["type"] == "missing":
        raise lines.error(f"`{what}` lacks `{fault['loc'][-1]}`", *place)
    if fault["type"] == "extra_forbidden":
        cure = f"there are {', '.join(MappingFile.model_fields)}" if len(place) == 1 else None
        raise lines.error(f"`{what}` is no key of the mapping language", *place, cure=cure)
    raise lines.error(f"`{what}`: {fault['msg'][0].lower()}{fault['msg'][1:]}", *place)


def _place(loc: tuple[int | str, ...], data: Any) -> tuple[int | str, ...]:
    """The parts of a pydantic location that are keys and indices of the data; the others name types."""
    place: list[int | str] = []
    for part in loc:
        if part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int):
            data = data[part]
            place.append(part)
    return tuple(place)
