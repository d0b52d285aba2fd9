"""timmport: brings vision checkpoints from any framework into timm, provably unchanged.

    from converters import convert, verify
    convert("swin_tiny.pth", "swin_tiny")
    verify("swin_tiny", "swin_tiny.pth").passed

Nothing heavy is imported until a name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.conversion import Conversion as Conversion
    from converters.conversion import Inspection as Inspection
    from converters.conversion import convert as convert
    from converters.conversion import inspect as inspect
    from converters.errors import ConverterError as ConverterError
    from converters.mapping import load_mapping as load_mapping
    from converters.readers import open_checkpoint as open_checkpoint
    from converters.verifier import verify as verify

_HOMES = {
    "Conversion": "conversion",
    "ConverterError": "errors",
    "Inspection": "conversion",
    "convert": "conversion",
    "inspect": "conversion",
    "load_mapping": "mapping",
    "open_checkpoint": "readers",
    "verify": "verifier",
}
__all__ = [
    "Conversion",
    "ConverterError",
    "Inspection",
    "convert",
    "inspect",
    "load_mapping",
    "open_checkpoint",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
