"""Reports of a difference: folded for a terminal, whole for programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from rich.markup import escape

from converters.differences import Ailment, Difference, Pair
from converters.errors import printable
from converters.folding import fold
from converters.reports.terminal import console
from converters.tensors import TensorSpec, size_of

__all__ = ["difference_document", "show_difference"]

_MOST_ROWS = 40
Item = TypeVar("Item", Pair, TensorSpec, Ailment)


def show_difference(found: Difference) -> None:
    """The verdict first, then what differs, folded, the farthest apart first."""
    mark = "[green]equal[/]" if found.equal else "[red]DIFFERENT[/]"
    console.print(f"{mark} {escape(printable(_summary(found), 1000))}")
    if any(found.prefixes):
        names = (found.first, found.second)
        taken = [f"`{prefix}` off {name}" for prefix, name in zip(found.prefixes, names, strict=True) if prefix]
        console.print(f"[dim]no name is on both sides; compared after taking {escape(printable(taken[0]))}[/]")
    _section("missing", "only in the first", found.missing, lambda some: _shape(some[0]))
    _section("extra", "only in the second", found.extra, lambda some: _shape(some[0]))
    _section("shapes", "differ", found.shapes, lambda some: f"{_shape(some[0].first)} and {_shape(some[0].second)}")
    _section("dtypes", "differ", found.dtypes, lambda some: f"{some[0].first.dtype} and {some[0].second.dtype}")
    _section("values", "differ", sorted(found.values, key=_apart, reverse=True), _distances)
    for side in ("first", "second"):
        ailing = [one for one in found.ailments if one.side == side]
        _section(
            "ailments", f"of the {side}", ailing, lambda some: f"{some[0].kind} in {sum(a.elements for a in some)}"
        )


def difference_document(found: Difference) -> dict[str, Any]:
    """Everything that was found out; distances of each pair that has one."""
    return {
        "difference": 1,
        "first": found.first,
        "second": found.second,
        "against_model": found.against_model,
        "equal": found.equal,
        "prefixes": list(found.prefixes),
        "common": len(found.pairs),
        "missing": [_spec(spec) for spec in found.missing],
        "extra": [_spec(spec) for spec in found.extra],
        "shapes": [
            {**_names(pair), "first": [*pair.first.shape], "second": [*pair.second.shape]} for pair in found.shapes
        ],
        "dtypes": [{**_names(pair), "first": pair.first.dtype, "second": pair.second.dtype} for pair in found.dtypes],
        "values": [{**_names(pair), **vars(pair.distance)} for pair in found.values],
        "ailments": [vars(one) for one in found.ailments],
    }


def _summary(found: Difference) -> str:
    counts = {
        "missing": len(found.missing),
        "extra": len(found.extra),
        "of another shape": len(found.shapes),
        "of another dtype": len(found.dtypes),
        "of other values": len(found.values),
    }
    told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    compared = "names and shapes" if found.against_model else "names, shapes, dtypes and values"
    return f"{found.first} and {found.second}: {len(found.pairs)} tensors in common" + (
        f"; {told}" if told else f", the same {compared}"
    )


def _section(label: str, what: str, items: Sequence[Item], tell: Callable[[list[Any]], str]) -> None:
    """A heading, and a line for each fold of names of which the same is told."""
    if not items:
        return
    console.print(f"[dim]{label:<10}[/] {len(items)} {what}")
    groups: dict[tuple[str, str], list[Any]] = {}
    for item in items:
        module = re.sub(r"[0-9]+", "#", re.sub(r"[./][^./]*$", "", item.name))
        kind = tell([item]) if label != "values" else ""
        groups.setdefault((module, kind), []).append(item)
    rows = [(_folded(item.name for item in some), tell(some)) for some in groups.values()]
    for names, told in rows[:_MOST_ROWS]:
        console.print(f"  {escape(printable(names, 400))}  [dim]{escape(told)}[/]")
    if len(rows) > _MOST_ROWS:
        console.print(f"  ... and {len(rows) - _MOST_ROWS} rows more; --json lists every tensor")


def _folded(names: Iterable[str]) -> str:
    return " ".join(text for text, _ in fold(names))


def _distances(some: Sequence[Pair]) -> str:
    """The worst of several."""
    found = [pair.distance for pair in some if pair.distance]
    ulps = [one.ulps for one in found if one.ulps is not None]
    steps = f", {max(ulps)} ULP" if ulps else ""
    most = (
        f"max {max(one.max_abs for one in found):.2g}, relative L2 {max(one.relative_l2 for one in found):.2g}{steps}"
    )
    return f"{most}, {sum(one.elements for one in found)} elements"


def _apart(pair: Pair) -> float:
    return pair.distance.relative_l2 if pair.distance else 0.0


def _shape(spec: TensorSpec) -> str:
    return size_of(spec.shape)


def _spec(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}


def _names(pair: Pair) -> dict[str, str]:
    return {"name": pair.name, "other": pair.other}
