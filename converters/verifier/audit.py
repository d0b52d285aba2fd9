"""The audit: what paired modules declare differently, before a number is computed.

It names causes (an eps, a stride) and decides nothing: it sees no activations, orders or interpolations, and a
finding may have no effect. What two frameworks say in ways that have no common measure is left out: a padding of
Keras's that may lie in a layer before, or a size that only one side has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from converters.verifier.references.torch_modules import Modules
from converters.verifier.taps import Pair
from converters.verifier.verdict import Finding

__all__ = ["audit"]

Declared = Mapping[str, Any]  # attribute: value, beside the `kind`


def audit(
    model: Any,
    source: Mapping[str, Declared],
    pairs: Sequence[Pair],
    deviation: Sequence[Mapping[str, Any]] = (),
) -> tuple[Finding, ...]:
    """The differences between timm's modules and the reference's; `source` is what a recording says of those."""
    ours = Modules(model, model).describe([pair.target for pair in pairs])
    alike: dict[tuple[str, ...], list[str]] = {}
    values: dict[tuple[str, ...], tuple[Any, Any]] = {}
    for pair in pairs:
        mine, theirs = ours.get(pair.target, {}), source.get(pair.source, {})
        for attribute in mine.keys() & theirs.keys() - {"kind"}:
            right, given = _comparable(attribute, theirs, mine)
            if right != given:
                key = attribute, str(mine["kind"]), str(right), str(given)
                alike.setdefault(key, []).append(pair.target)
                values[key] = right, given
    return tuple(
        Finding(key[0], key[1], *values[key], tuple(modules), _reason(key[0], *values[key], modules, deviation))
        for key, modules in sorted(alike.items())
    )


def _comparable(attribute: str, source: Declared, target: Declared) -> tuple[Any, Any]:
    """The source's value and timm's in one form; equal where nothing can be said.

    >>> conv = {"kernel_size": 3, "stride": 1, "dilation": 1, "padding": 1}
    >>> _comparable("padding", {**conv, "padding": "same"}, conv)
    (1, 1)
    >>> _comparable("padding", {**conv, "stride": 2, "padding": "same"}, {**conv, "stride": 2})
    ('same', 1)
    >>> _comparable("padding", {**conv, "padding": "valid"}, conv)
    (1, 1)
    """
    right, given = source[attribute], target[attribute]
    if attribute == "padding":
        if str(target.get("kind", "")).endswith("Same") or given == "same":
            given = "same"  # timm pads when it runs; the attribute says nothing
        if right == "valid":  # the layer before may pad
            return given, given
        if "same" in (right, given) and right != given:
            side, other = (source, given) if right == "same" else (target, right)
            if other == _half(side):
                return other, other
    return right, given


def _half(conv: Declared) -> Any:
    """The padding on both sides that `same` is at stride 1; None where it is none."""
    sizes = [conv.get(name, 1) for name in ("kernel_size", "dilation")]
    if conv.get("stride", 1) != 1:
        return None
    kernel, dilation = (size if isinstance(size, list) else [size, size] for size in sizes)
    pads = [d * (k - 1) / 2 for k, d in zip(kernel, dilation, strict=True)]
    return pads[0] if len(set(pads)) == 1 else pads


def _reason(
    attribute: str, right: Any, given: Any, modules: Sequence[str], deviation: Sequence[Mapping[str, Any]]
) -> str | None:
    """The mapping's own reason, if a deviation declares this."""
    for one in deviation:
        here = set(modules) <= set(one["where"])
        if here and (one["attribute"], one["source"], one["target"]) == (attribute, right, given):
            return str(one["reason"])
    return None
