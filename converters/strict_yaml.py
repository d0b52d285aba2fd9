"""YAML without its surprises, and with a line for every value.

Duplicate keys, `no` for False, `1:30` for 90, aliases and tags are errors that name their line.

>>> load("a: {b: [1, x]}", "f.yaml")[0]
{'a': {'b': [1, 'x']}}
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import yaml

from converters.errors import MappingError

__all__ = ["Lines", "load"]

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_DEEPEST = 20


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
        return MappingError(problem, file=f"{self.file}:{self.of(*path)}", cure=cure)


def load(text: str, file: str) -> tuple[Any, Lines]:
    """A document's plain data and its lines. Raises MappingError."""
    lines = Lines(file, {})
    try:
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        line = (error.problem_mark or error.context_mark).line + 1 if (error.problem_mark or error.context_mark) else 1
        raise MappingError(f"is no YAML: {error.problem or error.context}", file=f"{file}:{line}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise MappingError(f"is no YAML: {str(error).splitlines()[0]}", file=file) from error
    if root is None:
        raise MappingError("is empty", file=file)
    return _plain(root, (), lines, set()), lines


def _plain(node: yaml.Node, path: tuple[Hashable, ...], lines: Lines, seen: set[int]) -> Any:
    lines.by_path.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:
        raise lines.error("YAML aliases are not part of the mapping language", *path, cure="write it out")
    if len(path) > _DEEPEST:
        raise lines.error(f"nests deeper than {_DEEPEST} levels", *path)
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        plain: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = _key(key_node, path, lines)
            lines.by_path[(*path, key)] = key_node.start_mark.line + 1
            if key in plain:
                raise lines.error(f"`{key}` stands here twice", *path, key)
            plain[key] = _plain(value_node, (*path, key), lines, seen)
        return plain
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, index), lines, seen) for index, item in enumerate(node.value)]
    return _scalar(node, path, lines)


def _key(node: yaml.Node, path: tuple[Hashable, ...], lines: Lines) -> str:
    if not isinstance(node, yaml.ScalarNode):
        lines.by_path[(*path, "?")] = node.start_mark.line + 1
        raise lines.error("a key is one word; quote a pattern that begins with `{`", *path, "?")
    if node.tag in (_TAG + "bool", _TAG + "null") or (":" in node.value and node.tag == _TAG + "int"):
        lines.by_path[(*path, node.value)] = node.start_mark.line + 1
        raise lines.error(f"YAML does not read `{node.value}` as a name", *path, node.value, cure="quote it")
    return node.value


def _scalar(node: yaml.ScalarNode, path: tuple[Hashable, ...], lines: Lines) -> Any:
    text, kind = node.value, node.tag.removeprefix(_TAG)
    if kind == "str":
        return text
    if kind == "null":
        return None
    if kind == "bool" and text in ("true", "false"):
        return text == "true"
    if kind in ("int", "float"):
        if re.fullmatch(r"[-+]?[0-9]{1,18}", text):
            return int(text)
        if re.fullmatch(r"[-+]?[0-9]+\.?[0-9]*([eE][-+]?[0-9]+)?", text):
            return float(text)
    raise lines.error(f"YAML reads `{text}` as {kind}, not as text", *path, cure="quote it")
