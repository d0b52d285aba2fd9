"""Mapping files: a family's table, read from YAML, checked, and compiled.

Every fault is a MappingError that names file and line.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from converters.errors import MappingError
from converters.names import Match, Pattern, Template, split
from converters.ops import IDENTITY, Pipeline
from converters.schema import Deviation, MappingFile, ReferenceFile, Refusal, RowFile, validate
from converters.strict_yaml import Lines, load

__all__ = [
    "Drop",
    "Fill",
    "Leaf",
    "Mapping",
    "Numbering",
    "Rule",
    "Way",
    "find_mappings",
    "load_mapping",
    "mappings_folder",
    "most_specific",
]


@dataclass(frozen=True)
class Leaf:
    """One way to write a leaf: its name in timm and the ops that lay it out; `rank` chooses between ways."""

    name: str
    ops: Pipeline
    rank: int | None


Leaves = dict[str, tuple[Leaf, ...]]


@dataclass(frozen=True)
class Way:
    """Where a rule leads, if what its guard names is there."""

    template: Template
    ops: Pipeline
    source: Template | None = None
    target: Template | None = None


@dataclass(frozen=True, eq=False)
class Rule:
    """One row of the table; the first way whose guard holds is taken."""

    line: int
    pattern: Pattern
    ways: tuple[Way, ...]

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.ways[0].template.text}"


@dataclass(frozen=True, eq=False)
class Drop:
    """A source that is discarded, and why."""

    line: int
    pattern: Pattern
    reason: str

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Fill:
    """A value for targets that no source reaches."""

    line: int
    pattern: Pattern
    value: int | float

    @property
    def text(self) -> str:
        return f"{self.pattern.text}: {self.value}"


@dataclass(frozen=True)
class Numbering:
    """An entry of `enumerate`: captures on the left that stand for the target's modules, counted through.

    `n: blocks.{s}.{b}` has {n} be the number itself; `layers.{i}.{j}: blocks.{s}.{b}` counts the source's modules
    too, and the first is the first.
    """

    source: Pattern
    target: Pattern
    counted: bool  # whether the source's modules are

    @classmethod
    def parse(cls, left: str, target: Pattern, tables: dict[str, Any]) -> Numbering:
        """Raises ValueError."""
        counted = "{" in left
        return cls(Pattern.parse(left if counted else f"{{{left}}}", tables), target, counted)

    @property
    def fields(self) -> tuple[str, ...]:
        return tuple(sorted(self.source.fields))


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
    fill: tuple[Fill, ...]
    enumerate: tuple[Numbering, ...]
    preprocess: dict[str, Any]
    references: tuple[ReferenceFile, ...]
    refuse: tuple[Refusal, ...]
    taps: tuple[Rule, ...]
    deviation: tuple[tuple[Pattern, Deviation], ...]
    lines: Lines = field(repr=False)
    title: str = ""  # the file's first comment

    @property
    def any_target(self) -> bool:
        return not self.targets

    def args_of(self, target: str, reference: ReferenceFile | None = None) -> dict[str, Any]:
        """timm's arguments for a target; `$name` stands for a value of its row, and is left out where there is none."""
        args = {**self.target_args, **(reference.target_args if reference else {})}
        values = {f"${name}": value for name, value in self.targets.get(target, {}).items()}
        filled = {key: values.get(given, given) if isinstance(given, str) else given for key, given in args.items()}
        return {key: given for key, given in filled.items() if not str(given).startswith("$")}

    def stripped(self, name: str) -> tuple[str, ...]:
        """A source name's segments without the prefixes that the family may carry."""
        segments = split(name)
        for prefix in self.strip:
            found = prefix.match(segments)
            if found and found.rest:
                segments = found.rest
        return segments


Row = TypeVar("Row", bound=Rule | Drop | Fill)


def most_specific(rows: Iterable[Row], name: tuple[str, ...]) -> tuple[list[Row], Match | None]:
    """The rows that match a name and take most of it, most literally: none, one, or the several that tie."""
    best: list[Row] = []
    found: Match | None = None
    for row in rows:
        match = row.pattern.match(name)
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

    def numbering(left: str, right: str) -> Numbering:
        try:
            return Numbering.parse(left, pattern(right, "enumerate", left), file.tables)
        except ValueError as error:
            raise lines.error(str(error), "enumerate", left) from None

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
    rows += [Drop(lines.of("drop", left), pattern(left, "drop", left), reason) for left, reason in file.drop.items()]
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
        fill=tuple(
            Fill(lines.of("fill", text), pattern(text, "fill", text), value) for text, value in file.fill.items()
        ),
        enumerate=numberings,
        preprocess=file.preprocess,
        references=tuple(references),
        refuse=tuple(file.refuse),
        taps=tuple(rule("taps", left, [right], ()) for left, right in file.taps.items()),
        deviation=tuple((pattern(one.where, "deviation", i, "where"), one) for i, one in enumerate(file.deviation)),
        lines=lines,
        title=title,
    )


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
            if twice := given & numbering.target.fields:
                raise ValueError(f"{{{min(twice)}}} is captured on the left and by `enumerate` too")
            given |= numbering.target.fields
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
