"""Values: what a mapping file leaves open as `$name`, until a target is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["filled"]


def filled(template: Any, values: Mapping[str, Any]) -> Any:
    """A template with its `$names` replaced; an entry with a name that has no value is left out.

    >>> filled({"depth": "$depth", "groups": "$groups", "shape": ["$size", 3]}, {"depth": 50, "size": 8})
    {'depth': 50, 'shape': [8, 3]}
    >>> filled({"shape": ["$size", 3]}, {})
    {}
    """
    if isinstance(template, dict):
        return {key: filled(value, values) for key, value in template.items() if not _unknown(value, values)}
    if isinstance(template, list):
        return [filled(value, values) for value in template]
    return values[template[1:]] if isinstance(template, str) and template.startswith("$") else template


def _unknown(template: Any, values: Mapping[str, Any]) -> bool:
    if isinstance(template, list):
        return any(_unknown(part, values) for part in template)
    return isinstance(template, str) and template.startswith("$") and template[1:] not in values
