"""YAML without its surprises, and with a line for every value.

Duplicate keys, `no` for False, `1:30` for 90, `017` for 15, aliases and tags are errors that name their line;
`1e-5` is a number.

>>> load("a: {b: [1, x]}", "f.yaml")[0]
{'a': {'b': [1, 'x']}}
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from converters.errors import MappingError, printable

__all__ = ["Lines", "load"]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_DEEPEST = 20
_NUMBER = re.compile(r"[-+]?(?:0|[1-9][0-9]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?")  # YAML 1.1 reads 1e-5 as text


@dataclass(frozen=True)
class Lines:
    """Where each value of a file stands: path of keys and indices -> line, from 1."""

    file: str
    by_path: dict[tuple[Hashable, ...], int]

    def of(self, *path: Hashable) -> int:
        """The line of the value at `path`, or of the nearest thing around it."""
        while path and path not in self.by_path:
            path = path[:-1]
        return self.by_path.get(path, 1)

    def error(self, problem: str, *path: Hashable, cure: str | None = None) -> MappingError:
        return MappingError(printable(problem, 1000), file=f"{self.file}:{self.of(*path)}", cure=cure)


def load(text: str, file: str) -> tuple[Any, Lines]:
    """A document's plain data and its lines. Raises MappingError."""
    lines = Lines(file, {})
    try:
        _check_events(text, file)
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}" if mark else file
        raise MappingError(f"is no YAML: {error.problem or error.context}", file=place) from error
    except yaml.YAMLError as error:
        raise MappingError(f"is no YAML: {str(error).splitlines()[0]}", file=file) from error
    if root is None:
        raise MappingError("is empty", file=file)
    return _plain(root, (), lines), lines


def _check_events(text: str, file: str) -> None:
    """Refuse tags, aliases and deep nesting in the flat row of events; libyaml's composer recurses without a limit."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        tag = getattr(event, "tag", None)
        if isinstance(event, yaml.AliasEvent) or tag:
            what = f"tags ({printable(tag)})" if tag else "aliases"
            raise MappingError(f"YAML {what} are not part of the mapping language", file=f"{file}:{_line(event)}")
        if depth > _DEEPEST:
            raise MappingError(f"nests deeper than {_DEEPEST} levels", file=f"{file}:{_line(event)}")


def _plain(node: yaml.Node, path: tuple[Hashable, ...], lines: Lines) -> Any:
    lines.by_path.setdefault(path, _line(node))
    if isinstance(node, yaml.MappingNode):
        plain: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, path, lines)
            lines.by_path[(*path, key)] = _line(key_node)
            if key in plain:
                raise lines.error(f"`{key}` stands here twice", *path, key)
            plain[key] = _plain(value_node, (*path, key), lines)
        return plain
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, index), lines) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    return _scalar(node, path, lines)


def _key(node: yaml.Node, path: tuple[Hashable, ...], lines: Lines) -> str:
    if not isinstance(node, yaml.ScalarNode):
        lines.by_path[(*path, "?")] = _line(node)
        raise lines.error("a key is one word; quote a pattern that begins with `{`", *path, "?")
    if node.tag in (_TAG + "bool", _TAG + "null") or (":" in node.value and node.tag == _TAG + "int"):
        lines.by_path[(*path, node.value)] = _line(node)
        raise lines.error(f"YAML does not read `{node.value}` as a name", *path, node.value, cure="quote it")
    return node.value


def _scalar(node: yaml.ScalarNode, path: tuple[Hashable, ...], lines: Lines) -> Any:
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if kind == "str" and (node.style or not _NUMBER.fullmatch(text)):
        return text
    if kind == "null":
        return None
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    if kind in ("int", "float", "str") and (found := _NUMBER.fullmatch(text)):
        number = float(text) if found[1] or found[2] else int(text)
        if abs(number) < 1e18:
            return number
    cure = "quote text; write numbers as 17, 0.5 or 1e-5, and truth as true or false"
    raise lines.error(f"`{text}` has two readings in YAML", *path, cure=cure)


def _line(part: yaml.Node | yaml.Event) -> int:
    assert part.start_mark
    return part.start_mark.line + 1
