"""Mapping files: a family's table, read from YAML, checked, and compiled.

Every fault is a MappingError that names file and line. `MappingFile` is the schema (the command
`timmport families --schema` prints it for editors); `Mapping` is what the planner works with.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from converters.errors import MappingError
from converters.names import Match, Pattern, Template, split
from converters.ops import IDENTITY, Pipeline
from converters.strict_yaml import Lines, load

__all__ = ["Drop", "Leaf", "Mapping", "MappingFile", "Refusal", "Rule", "Way", "When", "find_mappings", "load_mapping"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class When(_Strict):
    """A guard: all that it names must hold."""

    source: str | None = None  # the checkpoint has this module or tensor
    target: str | None = None  # the timm model has it
    metadata: str | list[str] | None = None  # this text, or one of these, stands in what the checkpoint says of itself


class RowFile(_Strict):
    to: str
    when: When | None = None


class ReferenceFile(_Strict):
    """How to build the source framework's own model.

    `$name` stands for a value of the target's row, or for `$num_classes`, `$num_features`, `$in_chans` or
    `$img_size`; an entry whose `$name` has no value is left out.
    """

    runner: str
    model: dict[str, Any]
    outputs: dict[str, str]  # timm's output: the reference's, and an einops pattern where layouts differ
    when: When | None = None
    target_args: dict[str, Any] = {}  # what makes timm compute this reference's function


class Refusal(_Strict):
    """Sources that look like the family and compute another function."""

    reason: str
    when: When
    unless: When | None = None  # what proves that it is not so; without that proof the report carries the reason


class MappingFile(_Strict):
    """The schema of a mapping file."""

    targets: dict[str, dict[str, Any] | None] | Literal["any"]
    detect: list[str | list[str]] = Field(min_length=1)  # all must be there; of an inner list, one
    leaves: str
    rules: dict[str, str | RowFile | list[str | RowFile]]
    target_args: dict[str, Any] = {}
    strip: str | list[str] = []
    ops: dict[str, str] = {}
    drop: dict[str, str] = {}
    fill: dict[str, int | float] = {}
    enumerate: dict[str, str] = {}
    tables: dict[str, dict[str, int | str]] = {}
    preprocess: dict[str, Any] = {}
    reference: ReferenceFile | list[ReferenceFile] = []
    refuse: list[Refusal] = []


@dataclass(frozen=True)
class Leaf:
    """One way to write a leaf: its name in timm and the ops that lay it out; `rank` chooses between ways."""

    name: str
    ops: Pipeline
    rank: int | None


Leaves = dict[str, tuple[Leaf, ...]]


@dataclass(frozen=True)
class Way:
    """Where a rule leads, and under which guard."""

    template: Template
    ops: Pipeline
    when: When | None = None


@dataclass(frozen=True)
class Rule:
    """One row of the table; the first way whose guard holds is taken."""

    line: int
    pattern: Pattern
    ways: tuple[Way, ...]

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.ways[0].template.text}"


@dataclass(frozen=True)
class Drop:
    """A source that is discarded, and why."""

    line: int
    pattern: Pattern
    reason: str

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.reason}"


@dataclass(frozen=True)
class Mapping:
    """A family, ready to plan with."""

    name: str  # "mmlab/swin", or the path of a file of the user's own
    path: Path
    targets: dict[str, dict[str, Any]]  # empty: any timm model
    target_args: dict[str, Any]
    detect: tuple[tuple[Pattern, ...], ...]
    strip: tuple[Pattern, ...]
    leaves: Leaves
    rows: tuple[Rule | Drop, ...]
    fill: tuple[tuple[Pattern, int | float], ...]
    enumerate: dict[str, Pattern]
    preprocess: dict[str, Any]
    references: tuple[ReferenceFile, ...]
    refuse: tuple[Refusal, ...]
    lines: Lines = field(repr=False)
    title: str = ""  # the file's first comment

    @property
    def any_target(self) -> bool:
        return not self.targets

    def stripped(self, name: str) -> tuple[str, ...]:
        """A source name's segments without the prefixes that the family may carry."""
        segments = split(name)
        for prefix in self.strip:
            found = prefix.match(segments)
            if found and found.rest:
                segments = found.rest
        return segments

    def best_row(self, segments: tuple[str, ...]) -> tuple[list[Rule | Drop], Match | None]:
        """The most specific row for a name: none, one, or the several that tie."""
        best: list[Rule | Drop] = []
        found: Match | None = None
        for row in self.rows:
            match = row.pattern.match(segments)
            if match is None or (found and match.rank < found.rank):
                continue
            if found is None or match.rank > found.rank:
                best, found = [row], match
            else:
                best.append(row)
        return best, found


def mappings_folder() -> Path:
    """Where the mapping files are: in the wheel inside the package, in a checkout beside it."""
    package = Path(__file__).parent
    inside = package / "mappings"
    return inside if inside.is_dir() else package.parent / "mappings"


def find_mappings() -> dict[str, Path]:
    """Every family that ships, by name."""
    folder = mappings_folder()
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in sorted(folder.glob("*/*.yaml"))}


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


@lru_cache(maxsize=256)
def _load(path: Path, name: str) -> Mapping:
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MappingError(f"cannot be read: {error}", file=path) from error
    data, lines = load(text, str(path))
    title = text.splitlines()[0].lstrip("# ") if text.startswith("#") else ""
    return _compile(_validate(data, lines), name, path, lines, title)


def _validate(data: Any, lines: Lines) -> MappingFile:
    try:
        return MappingFile.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = tuple(part for part in first["loc"] if isinstance(part, int) or part in str(data))
        what = ".".join(map(str, place)) or "the file"
        if first["type"] == "extra_forbidden":
            known = ", ".join(MappingFile.model_fields) if len(place) == 1 else "see the README"
            raise lines.error(
                f"`{what}` is no key of the mapping language", *place, cure=f"there are {known}"
            ) from None
        raise lines.error(f"`{what}`: {first['msg'].lower()}", *place) from None


def _compile(file: MappingFile, name: str, path: Path, lines: Lines, title: str) -> Mapping:
    def pattern(text: str, *place: str | int) -> Pattern:
        try:
            return Pattern.parse(text, file.tables)
        except ValueError as error:
            raise lines.error(str(error), *place) from None

    rows: list[Rule | Drop] = []
    for left, right in file.rules.items():
        parsed = pattern(left, "rules", left)
        ways = [
            RowFile(to=way) if isinstance(way, str) else way for way in (right if isinstance(right, list) else [right])
        ]
        rows.append(Rule(lines.of("rules", left), parsed, tuple(_way(way, parsed, file, lines) for way in ways)))
    rows += [Drop(lines.of("drop", left), pattern(left, "drop", left), reason) for left, reason in file.drop.items()]
    numbered = {key: pattern(text, "enumerate", key) for key, text in file.enumerate.items()}
    references = file.reference if isinstance(file.reference, list) else [file.reference]
    strip = [file.strip] if isinstance(file.strip, str) else file.strip
    return Mapping(
        name=name,
        path=path,
        targets={} if file.targets == "any" else {key: value or {} for key, value in file.targets.items()},
        target_args=file.target_args,
        detect=tuple(
            tuple(pattern(text, "detect", i) for text in ([one] if isinstance(one, str) else one))
            for i, one in enumerate(file.detect)
        ),
        strip=tuple(pattern(text.rstrip("./"), "strip", i) for i, text in enumerate(strip)),
        leaves=_leaves(file.leaves, lines),
        rows=tuple(rows),
        fill=tuple((pattern(text, "fill", text), value) for text, value in file.fill.items()),
        enumerate=numbered,
        preprocess=file.preprocess,
        references=tuple(references),
        refuse=tuple(file.refuse),
        lines=lines,
        title=title,
    )


def _way(way: RowFile, left: Pattern, file: MappingFile, lines: Lines) -> Way:
    name, _, ops = _outside_braces(way.to)
    try:
        template = Template.parse(name.strip())
        given = set(left.fields)
        for key in left.fields & set(file.enumerate):
            given |= Pattern.parse(file.enumerate[key]).fields
        if missing := template.fields - given:
            raise ValueError(f"{{{'}, {'.join(sorted(missing))}}} on the right is captured nowhere on the left")
        return Way(template, Pipeline.parse(ops, file.ops), way.when)
    except ValueError as error:
        raise lines.error(str(error), "rules", left.text) from None


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
                layouts[framework][leaf] = tuple(_leaf(way) for way in ([ways] if isinstance(ways, str) else ways))
            except ValueError as error:
                raise lines.error(str(error), framework, leaf) from None
    return layouts, ", ".join(layouts)


def _leaf(text: str) -> Leaf:
    name, _, ops = text.partition("|")
    pipeline = Pipeline.parse(ops)
    return Leaf(name.strip(), pipeline, pipeline.ops[0].rank if pipeline != IDENTITY else None)


def _leaves(framework: str, lines: Lines) -> Leaves:
    layouts, known = _all_leaves()
    if framework not in layouts:
        raise lines.error(f"leaves.yaml has no layout `{framework}`", "leaves", cure=f"there are {known}")
    return layouts[framework]
