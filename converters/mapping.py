"""Mapping files: a family's table, read from YAML, checked, and compiled.

Every fault is a MappingError that names file and line.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from converters.calculations import FORMULAS
from converters.errors import MappingError
from converters.names import Pattern, Template, split
from converters.ops import IDENTITY, Pipeline
from converters.rows import Drop, Fill, Leaf, Leaves, Numbering, Rule, Stack, Way
from converters.schema import (
    Deviation,
    DropFile,
    Evidence,
    FillFile,
    MappingFile,
    ReferenceFile,
    Refusal,
    RowFile,
    validate,
)
from converters.signature import Sign, Signature
from converters.strict_yaml import Lines, load

__all__ = [
    "Mapping",
    "find_mappings",
    "load_mapping",
    "mappings_folder",
]


@dataclass(frozen=True)
class Mapping(Signature):
    """A family, ready to plan with."""

    name: str  # "mmlab/swin", or the path of a file of the user's own
    path: Path
    any_target: bool  # whether every timm model may be one
    targets: dict[str, dict[str, Any]]  # with what builds the reference of each
    target_args: dict[str, Any]
    leaves: Leaves
    rows: tuple[Rule | Drop, ...]
    fill: tuple[Fill, ...]
    enumerate: tuple[Numbering, ...]
    unstack: tuple[Stack, ...]
    preprocess: dict[str, Any]
    references: tuple[ReferenceFile, ...]
    refuse: tuple[Refusal, ...]
    caveat: str
    taps: tuple[Rule, ...]
    deviation: tuple[tuple[Pattern, Deviation], ...]
    lines: Lines = field(repr=False)
    title: str = ""  # the file's first comment

    @property
    def target_names(self) -> list[str]:
        """Its targets; "any" where every timm model is one."""
        return ["any"] if self.any_target else list(self.targets)

    def args_of(self, target: str, reference: ReferenceFile | None = None) -> dict[str, Any]:
        """timm's arguments for a target; `$name` stands for a value of its row, and is left out where there is none."""
        args = {**self.target_args, **(reference.target_args if reference else {})}
        values = {f"${name}": value for name, value in self.targets.get(target, {}).items()}
        filled = {key: values.get(given, given) if isinstance(given, str) else given for key, given in args.items()}
        return {key: given for key, given in filled.items() if not str(given).startswith("$")}


def mappings_folder() -> Path:
    """Where the mapping files are: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    inside = package / "mappings"
    return inside if inside.is_dir() else package.parent / "mappings"


def find_mappings() -> dict[str, Path]:
    """Every family that ships, by name."""
    folder = mappings_folder()
    return {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("*/*.yaml"))}


def load_mapping(family: str) -> Mapping:
    """A family by name ("mmlab/swin"), or a mapping file by its path. Raises MappingError."""
    known = find_mappings()
    if family in known:
        return _load(known[family], family)
    if family.endswith((".yaml", ".yml")) or Path(family).is_file():
        return _load(Path(family), family)
    near = [name for name in known if family in name]
    raise MappingError(
        f"there is no family `{family}`",
        cure=f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}",
    )


def _load(path: Path, name: str) -> Mapping:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MappingError(f"cannot be read: {error}", file=path) from error
    return _read(text, path, name)


@lru_cache(maxsize=256)
def _read(text: str, path: Path, name: str) -> Mapping:
    data, lines = load(text, str(path))
    title = text.splitlines()[0].lstrip("# ") if text.startswith("#") else ""
    return _compile(validate(data, lines), name, path, lines, title)


def _compile(file: MappingFile, name: str, path: Path, lines: Lines, title: str) -> Mapping:
    def pattern(text: str, *place: str | int) -> Pattern:
        try:
            return Pattern.parse(text, file.tables)
        except ValueError as error:
            raise lines.error(str(error), *place) from None

    for key, text in file.ops.items():
        _check_op(key, text, lines)

    def sign(text: str, place: int) -> Sign:
        try:
            return Sign.parse(text, file.tables)
        except ValueError as error:
            raise lines.error(str(error), "detect", place) from None

    def numbering(left: str, right: str | list[str]) -> Numbering:
        targets = tuple(pattern(text, "enumerate", left) for text in ([right] if isinstance(right, str) else right))
        try:
            return Numbering.parse(left, targets, file.tables)
        except ValueError as error:
            raise lines.error(str(error), "enumerate", left) from None

    def stack(left: str, right: str) -> Stack:
        try:
            return Stack.parse(left, right, file.tables)
        except ValueError as error:
            raise lines.error(str(error), "unstack", left) from None

    numberings = tuple(numbering(left, right) for left, right in file.enumerate.items())

    def rule(table: str, left: str, ways: list[str | RowFile], numbers: tuple[Numbering, ...]) -> Rule:
        parsed = pattern(left, table, left)
        if None in parsed.segments:
            raise lines.error("`**` stands in drop and fill only", table, left)
        try:
            return Rule(lines.of(table, left), parsed, tuple(_way(way, parsed, numbers, file.ops) for way in ways))
        except ValueError as error:
            raise lines.error(str(error), table, left) from None

    rows: list[Rule | Drop] = [
        rule("rules", left, right if isinstance(right, list) else [right], numberings)
        for left, right in file.rules.items()
    ]
    for left, drop in file.drop.items():
        rows.append(_drop(left, drop, pattern, file.ops, lines))
    if file.targets == "none" and not any(one.when == Evidence() for one in file.refuse):
        raise lines.error("without targets a family needs a reason: a `refuse` without `when`", "targets")
    references = file.reference if isinstance(file.reference, list) else [file.reference]
    strip = [file.strip] if isinstance(file.strip, str) else file.strip
    return Mapping(
        name=name,
        path=path,
        any_target=file.targets == "any",
        targets={} if isinstance(file.targets, str) else {key: value or {} for key, value in file.targets.items()},
        target_args=file.target_args,
        detect=tuple(
            tuple(sign(text, i) for text in ([one] if isinstance(one, str) else one))
            for i, one in enumerate(file.detect)
        ),
        strip=tuple(pattern(text.rstrip("./"), "strip", i) for i, text in enumerate(strip)),
        renumber=tuple(file.renumber),
        leaves=_leaves(file.leaves, lines),
        rows=tuple(rows),
        fill=tuple(
            Fill(lines.of("fill", text), pattern(text, "fill", text), *_value(value, "fill", text, lines=lines))
            for text, value in file.fill.items()
        ),
        enumerate=numberings,
        unstack=tuple(stack(left, right) for left, right in file.unstack.items()),
        preprocess=file.model_dump(include={"preprocess"})["preprocess"],
        references=tuple(references),
        refuse=tuple(file.refuse),
        caveat=file.caveat,
        taps=tuple(rule("taps", left, [right], ()) for left, right in file.taps.items()),
        deviation=tuple((pattern(one.where, "deviation", i, "where"), one) for i, one in enumerate(file.deviation)),
        lines=lines,
        title=title,
    )


def _drop(left: str, drop: str | DropFile, pattern: Callable[..., Pattern], ops: dict[str, str], lines: Lines) -> Drop:
    parsed = pattern(left, "drop", left)
    if isinstance(drop, str):
        return Drop(lines.of("drop", left), parsed, drop)
    if drop.only == "zeros":
        return Drop(lines.of("drop", left), parsed, drop.reason, zeros=True)
    name, _, pipeline = _outside_braces(drop.only)
    buffer = Template.parse(name.strip())
    if missing := buffer.fields - parsed.fields:
        raise lines.error(f"`{buffer.text}`: {{{min(missing)}}} is captured nowhere on the left", "drop", left)
    try:
        return Drop(lines.of("drop", left), parsed, drop.reason, buffer=buffer, ops=Pipeline.parse(pipeline, ops))
    except ValueError as error:
        raise lines.error(str(error), "drop", left) from None


def _value(fill: int | float | str | FillFile, *place: str, lines: Lines) -> tuple[int | float | str, str]:
    value, reason = (fill.value, fill.reason) if isinstance(fill, FillFile) else (fill, "")
    if isinstance(value, str) and value not in FORMULAS:
        raise lines.error(f"`{value}` is no formula; there are {', '.join(FORMULAS)}", *place)
    return value, reason


def _check_op(name: str, text: str, lines: Lines) -> None:
    try:
        Pipeline.parse(text)
    except ValueError as error:
        raise lines.error(str(error), "ops", name) from None
    with suppress(ValueError):
        Pipeline.parse(name)
        raise lines.error(f"`{name}` is a built-in op", "ops", name, cure="choose another name")


def _way(row: str | RowFile, left: Pattern, numberings: tuple[Numbering, ...], ops: dict[str, str]) -> Way:
    row = RowFile(to=row) if isinstance(row, str) else row
    name, _, pipeline = _outside_braces(row.to)
    template = Template.parse(name.strip())
    source, target = (Template.parse(text) if text else None for text in (row.when.source, row.when.target))
    given = set(left.fields)
    for numbering in numberings:
        if left.fields.issuperset(numbering.fields):
            fields = {field for target in numbering.targets for field in target.fields}
            if twice := given & fields:
                raise ValueError(f"{{{min(twice)}}} is captured on the left and by `enumerate` too")
            given |= fields
    for needs in filter(None, (template, source, target)):
        if missing := needs.fields - given:
            raise ValueError(f"`{needs.text}`: {{{min(missing)}}} is captured nowhere on the left")
    return Way(template, Pipeline.parse(pipeline, ops), source, target)


def _outside_braces(text: str) -> tuple[str, str, str]:
    """`a.{q|k}.b | op` -> ("a.{q|k}.b", "|", "op"): the first bar that is not inside braces."""
    depth = 0
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "|" and not depth:
            return text[:index], "|", text[index + 1 :]
    return text, "", ""


@lru_cache(maxsize=1)
def _all_leaves() -> tuple[dict[str, Leaves], str]:
    path = mappings_folder() / "leaves.yaml"
    data, lines = load(path.read_text("utf-8"), str(path))
    layouts: dict[str, Leaves] = {}
    for framework, leaves in data.items():
        layouts[framework] = {}
        for leaf, ways in (leaves or {}).items():
            try:
                layouts[framework][leaf] = _ways_of(ways)
            except ValueError as error:
                raise lines.error(str(error), framework, leaf) from None
    return layouts, ", ".join(layouts)


def _leaf(text: str) -> Leaf:
    name, _, ops = text.partition("|")
    pipeline = Pipeline.parse(ops)
    return Leaf(name.strip(), pipeline, pipeline.ops[0].rank if pipeline != IDENTITY else None)


def _leaves(layout: str | dict[str, str | list[str]], lines: Lines) -> Leaves:
    """A framework's layout, or one that is like it but for some leaves of the family's own."""
    layouts, known = _all_leaves()
    own = {} if isinstance(layout, str) else dict(layout)
    framework = layout if isinstance(layout, str) else own.pop("like", "")
    if framework not in layouts:
        raise lines.error(f"leaves.yaml has no layout `{framework}`", "leaves", cure=f"there are {known}")
    try:
        return layouts[framework] | {"/".join(split(leaf)): _ways_of(ways) for leaf, ways in own.items()}
    except ValueError as error:
        raise lines.error(str(error), "leaves") from None


def _ways_of(ways: str | list[str]) -> tuple[Leaf, ...]:
    return tuple(_leaf(way) for way in ([ways] if isinstance(ways, str) else ways))
