"""The name language: patterns that read names, templates that write them.

A name is segments between `.` or `/`. In a pattern

    {i}          captures a number within its segment
    {l}          captures one of the words of table `l`, where the mapping has such a table
    {*}          captures any text within a segment
    {**}         captures any number of whole segments
    {q|k|v}      takes each of these words, in this order: a gather on the left, a scatter on the right; on the
                 left a word may be several segments: {bn.bias|conv.bias}
    *            any text within a segment, not captured
    **           any number of whole segments

and everything else is itself. A pattern matches a name from its first segment to the end of a segment, so
that a module's pattern also takes what lies under the module. In a template `{i+1}` is integer arithmetic.
What could be read in two ways (`{i}{j}`, `*{i}`) is refused.

>>> found = Pattern.parse("stages.{i}.downsample").match(split("stages.2.downsample.norm.weight"))
>>> found.captures, found.rest
({'i': 2}, ('norm', 'weight'))
>>> Template.parse("layers.{i+1}.downsample").render(found.captures)
('layers.3.downsample',)
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache

__all__ = ["Match", "Pattern", "Template", "prefixes", "split"]

Value = int | str
Tables = Mapping[str, Mapping[str, Value]]

_TEXT, _NUMBER = "[^./]*", "[0-9]{1,9}"
_FIELD = re.compile(r"\{([^{}]*)\}")
_NAME = re.compile(r"[A-Za-z][A-Za-z_0-9]*")
_OPERATORS: dict[type, Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


@lru_cache(maxsize=1 << 16)
def split(name: str) -> tuple[str, ...]:
    """A name's segments.

    >>> split("stem/conv2d/kernel"), split("stages.0.norm")
    (('stem', 'conv2d', 'kernel'), ('stages', '0', 'norm'))
    """
    return tuple(re.split(r"[./]", name))


def prefixes(names: Iterable[tuple[str, ...]]) -> frozenset[tuple[str, ...]]:
    """Every name and every module around one; no deeper than 64 segments, so that a hostile name costs no memory.

    >>> sorted(prefixes([("a", "b", "weight")]))
    [('a',), ('a', 'b'), ('a', 'b', 'weight')]
    """
    return frozenset(name[:end] for name in names for end in range(1, min(len(name), 64) + 1))


@dataclass(frozen=True, slots=True)
class Match:
    """What a pattern found in a name."""

    captures: dict[str, Value]
    rest: tuple[str, ...]  # the segments behind the match
    rank: tuple[int, int]  # segments taken, literal characters: the greater is the more specific
    choice: int = 0  # which word of a gather


@dataclass(frozen=True)
class Pattern:
    """The left side of a row, read once into one regular expression a segment.

    >>> Pattern.parse("**.relative_position_index").match(split("a.b.relative_position_index")).rank
    (3, 23)
    >>> Pattern.parse("{query|key|value}.weight").choices
    ('query', 'key', 'value')
    """

    text: str
    segments: tuple[re.Pattern[str] | None, ...]  # None is `**`
    literals: int
    choices: tuple[str, ...] = ()
    tables: Tables = field(default_factory=dict, compare=False)
    across: tuple[bool, ...] = ()  # of each `**`, whether it is captured
    ways: tuple[Pattern, ...] = ()  # one for each choice, where these are of several segments

    @classmethod
    def parse(cls, text: str, tables: Tables | None = None) -> Pattern:
        """Raises ValueError with what is wrong about `text`."""
        tables = tables or {}
        if gather := re.search(r"\{([^{}]*\|[^{}]*[./][^{}]*|[^{}]*[./][^{}]*\|[^{}]*)\}", text):
            names = _words(gather[1], across=True)
            ways = tuple(cls.parse(text.replace(gather[0], name), tables) for name in names)
            if any(way.choices for way in ways):
                raise ValueError(f"`{text}` gathers twice")
            shortest = min(ways, key=lambda way: (len(way.segments), way.literals))
            return replace(shortest, text=text, choices=names, ways=ways)
        segments: list[re.Pattern[str] | None] = []
        literals, choices, seen, across = 0, tuple[str, ...](), set[str](), tuple[bool, ...]()
        for segment in _segments_of(re.sub(r"([./]\*\*)+$", "", text)):
            if segment in ("**", "{**}"):
                segments.append(None)
                across += (segment != "**",)
                continue
            if not segment:
                raise ValueError(f"`{text}` has a segment without text")
            regex = ""
            for literal, inside in _pieces(segment):
                if inside is None:
                    literals += len(literal.replace("*", ""))
                    regex += _TEXT.join(map(re.escape, literal.split("*")))
                elif "|" in inside:
                    if choices:
                        raise ValueError(f"`{text}` gathers twice")
                    choices = _words(inside)
                    literals += min(map(len, choices))
                    regex += f"(?P<_choice>{'|'.join(map(re.escape, choices))})"
                elif inside in seen:
                    raise ValueError(f"`{text}` captures {{{inside}}} twice")
                elif inside == "*":
                    seen.add(inside)
                    regex += f"(?P<_any>{_TEXT})"
                elif not _NAME.fullmatch(inside):
                    raise ValueError(f"`{{{inside}}}` is no capture; arithmetic belongs on the right side")
                else:
                    seen.add(inside)
                    words = sorted(map(re.escape, tables.get(inside, ())), key=len, reverse=True)
                    literals += min(map(len, tables.get(inside, ())), default=0)
                    regex += f"(?P<{inside}>{'|'.join(words) or _NUMBER})"
            outline = _FIELD.sub(lambda f: f[0] if "|" in f[1] or f[1] in tables else "*", segment)
            if "**" in outline or segment.count("*") > 2:
                raise ValueError(f"`{segment}` can be read in more than one way; put text between its wildcards")
            segments.append(re.compile(regex))
        if sum(across) > 1:
            raise ValueError(f"`{text}` captures {{**}} twice")
        known = {k: v for k, v in tables.items() if k in seen}
        return cls(text, tuple(segments), literals, choices, known, across)

    def match(self, name: tuple[str, ...]) -> Match | None:
        """What this pattern takes of a name's segments, or None."""
        if self.ways:
            each = ((choice, way.match(name)) for choice, way in enumerate(self.ways))
            return next((replace(match, choice=choice) for choice, match in each if match), None)
        if None in self.segments:
            across = self._match_across(name)
            if across is None:
                return None
            taken, groups = across
        elif len(name) < len(self.segments):
            return None
        else:
            taken, groups = len(self.segments), {}
            for regex, segment in zip(self.segments, name, strict=False):
                found = regex.fullmatch(segment)  # type: ignore[union-attr]
                if not found:
                    return None
                groups.update(found.groupdict())
        choice = self.choices.index(groups.pop("_choice")) if self.choices else 0
        captures = dict(self._capture(key, text) for key, text in groups.items())
        return Match(captures, name[taken:], (taken, self.literals), choice)

    def _match_across(self, name: tuple[str, ...]) -> tuple[int, dict[str, str]] | None:
        """Segments taken by a pattern with `**`, the shortest way first; a table over positions, never exponential."""
        reached: dict[int, dict[str, str]] = {0: {}}
        captures = iter(self.across)
        for regex in self.segments:
            following: dict[int, dict[str, str]] = {}
            captured = regex is None and next(captures)
            for position, groups in reached.items():
                if regex is None:
                    for later in range(position, len(name)):
                        more = {"_across": ".".join(name[position:later])} if captured else {}
                        following.setdefault(later, {**groups, **more})
                elif position < len(name) and (found := regex.fullmatch(name[position])):
                    following.setdefault(position + 1, {**groups, **found.groupdict()})
            reached = following
        return min(reached.items(), default=None, key=lambda item: item[0])

    def number(self, names: Iterable[tuple[str, ...]]) -> list[dict[str, Value]]:
        """The captures of every module that it finds, in order of their numbers, and else of the names.

        >>> Pattern.parse("s{i}.{j}").number([("s1", "0", "bias"), ("s0", "10"), ("s0", "9"), ("s0", "9", "weight")])
        [{'i': 0, 'j': 9}, {'i': 0, 'j': 10}, {'i': 1, 'j': 0}]
        """
        found = dict.fromkeys(tuple(match.captures.items()) for name in names if (match := self.match(name)))
        return sorted(map(dict, found), key=lambda one: [value for value in one.values() if isinstance(value, int)])

    @property
    def fields(self) -> frozenset[str]:
        """The captures that it gives."""
        words = {word for regex in self.segments if regex for word in regex.groupindex} - {"_choice"}
        given = {"*" if word == "_any" else word for word in words}
        return frozenset(given | ({"**"} if any(self.across) else set()))

    def _capture(self, key: str, text: str) -> tuple[str, Value]:
        if key in ("_any", "_across"):
            return ("*" if key == "_any" else "**"), text
        return key, self.tables[key][text] if key in self.tables else int(text)


@dataclass(frozen=True)
class Template:
    """The right side of a row: literal text and expressions over captures.

    >>> Template.parse("blocks.{2*i+1}.{k|v}_proj").render({"i": 3})
    ('blocks.7.k_proj', 'blocks.7.v_proj')
    """

    text: str
    pieces: tuple[tuple[str, ast.expr | tuple[str, ...] | None], ...]  # literal, then an expression or words

    @classmethod
    def parse(cls, text: str) -> Template:
        """Raises ValueError with what is wrong about `text`."""
        pieces: list[tuple[str, ast.expr | tuple[str, ...] | None]] = []
        for literal, inside in _pieces(text):
            if inside is None:
                if "*" in literal:
                    raise ValueError(f"`{text}`: a bare `*` has no meaning on the right side; capture it as {{*}}")
                pieces.append((literal, None))
            elif "|" in inside:
                pieces.append(("", _words(inside)))
            else:
                pieces.append(("", ast.Name(inside) if inside in ("*", "**") else _expression(inside)))
        return cls(text, tuple(pieces))

    @property
    def fields(self) -> set[str]:
        """The captures that it needs."""
        expressions = [piece for _, piece in self.pieces if isinstance(piece, ast.expr)]
        return {node.id for tree in expressions for node in ast.walk(tree) if isinstance(node, ast.Name)}

    def render(self, captures: Mapping[str, Value]) -> tuple[str, ...]:
        """The names for these captures: one, or as many as its scatter has words.

        KeyError if a capture is missing; ValueError where the arithmetic fails.
        """
        texts = [""]
        for literal, piece in self.pieces:
            if piece is None:
                texts = [text + literal for text in texts]
            elif isinstance(piece, tuple):
                texts = [text + word for text in texts for word in piece]
            else:
                texts = [text + str(_evaluate(piece, captures)) for text in texts]
        return tuple(texts)


def _segments_of(text: str) -> list[str]:
    """Segments of a pattern; separators inside braces do not count."""
    return [part for part in re.split(r"[./](?![^{}]*\})", text)]


def _pieces(text: str) -> list[tuple[str, str | None]]:
    """Literals and fields in turn: (literal, None) or ("", field)."""
    pieces: list[tuple[str, str | None]] = []
    for index, part in enumerate(_FIELD.split(text)):
        if index % 2:
            pieces.append(("", part.strip()))
        elif "{" in part or "}" in part:
            raise ValueError(f"`{text}` has a brace without its partner")
        elif part:
            pieces.append((part, None))
    return pieces


def _words(field: str, across: bool = False) -> tuple[str, ...]:
    """The words of a gather or a scatter; `across` lets them be of several segments."""
    words = tuple(word.strip() for word in field.split("|"))
    if len(set(words)) < len(words) or any(re.search(r"\*" if across else r"[./*]", word) for word in words):
        raise ValueError(f"`{{{field}}}` must name different words" + ("" if across else ", each within one segment"))
    return words


def _expression(field: str) -> ast.expr:
    try:
        tree = ast.parse(field, mode="eval").body
        allowed = (
            len(field) <= 100
            and all(
                isinstance(node, (ast.BinOp, ast.Name, ast.operator, ast.expr_context))
                or (isinstance(node, ast.Constant) and type(node.value) is int)
                for node in ast.walk(tree)
            )
            and all(type(node.op) in _OPERATORS for node in ast.walk(tree) if isinstance(node, ast.BinOp))
        )
    except (SyntaxError, ValueError):
        allowed = False
    if not allowed:
        raise ValueError(f"`{{{field}}}` is no expression of captures, whole numbers and + - * // %")
    return tree


def _evaluate(node: ast.expr, captures: Mapping[str, Value]) -> Value:
    if isinstance(node, ast.Name):
        return captures[node.id]
    if isinstance(node, ast.Constant):
        return node.value  # type: ignore[return-value]
    assert isinstance(node, ast.BinOp)
    left, right = _evaluate(node.left, captures), _evaluate(node.right, captures)
    if isinstance(left, str) or isinstance(right, str):
        raise ValueError(f"`{left if isinstance(left, str) else right}` is no number to calculate with")
    try:
        return _OPERATORS[type(node.op)](left, right)
    except ZeroDivisionError:
        raise ValueError(f"`{ast.unparse(node)}` divides by zero") from None
