"""Targets: timm's own architectures, built on torch's meta device, where they have shapes and no data."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

from converters.errors import TargetError
from converters.names import Pattern, prefixes, split
from converters.tensors import TensorSpec

__all__ = ["Skeleton", "Traits", "build_skeleton", "compute_buffers", "is_known", "traits_of"]


_LOADING = {"cache_dir", "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay"}


@dataclass(frozen=True)
class Traits:
    """What timm says of an architecture before it is built."""

    classifiers: tuple[str, ...]  # modules whose first axis counts the classes
    first_convs: tuple[str, ...]  # modules whose second axis counts the input channels
    num_classes: int
    in_chans: int


@dataclass(frozen=True)
class Skeleton:
    """A timm architecture with its arguments, and every tensor of its state dict."""

    architecture: str
    args: dict[str, Any]
    specs: dict[str, TensorSpec]
    model: Any = field(repr=False, compare=False)  # a torch.nn.Module on the meta device

    @cached_property
    def modules(self) -> frozenset[tuple[str, ...]]:
        """Every tensor and every module around one, as segments."""
        return prefixes(map(split, self.specs))

    @cached_property
    def buffers(self) -> dict[str, tuple[int, ...]]:
        """The shapes of what the model computes for itself, in its state dict or not."""
        return {name: tuple(buffer.shape) for name, buffer in self.model.named_buffers()}

    def number(self, *patterns: Pattern) -> list[dict[str, int | str]]:
        """The captures of every module that the patterns find, in order of their numbers; of several, of the model."""
        names = [split(name) for name in self.specs]
        if len(patterns) == 1:
            return patterns[0].number(names)
        found = {
            (pattern.text, tuple(match.captures.items())): dict(match.captures)
            for name in names
            for pattern in patterns
            if (match := pattern.match(name))
        }
        return list(found.values())


def compute_buffers(skeleton: Skeleton) -> dict[str, Any]:
    """The values of the model's buffers; its parameters take no memory, as nothing is written to them."""
    import timm

    with _without_initialisation():
        model = timm.create_model(skeleton.architecture, pretrained=False, **skeleton.args)
    return dict(model.named_buffers())


def is_known(architecture: str) -> bool:
    """Whether the installed timm has it."""
    import timm

    return timm.is_model(architecture)


def traits_of(architecture: str) -> Traits:
    """Raises TargetError when timm has no such architecture."""
    import timm

    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        raise TargetError(
            f"timm {timm.__version__} has no model `{architecture}`",
            cure=f"did you mean {' or '.join(near)}?" if near else "see timm.list_models()",
        )
    cfg = timm.get_pretrained_cfg(architecture)
    if cfg is None:
        return Traits((), (), 1000, 3)
    return Traits(_names(cfg.classifier), _names(cfg.first_conv), cfg.num_classes, cfg.input_size[0])


def build_skeleton(architecture: str, args: dict[str, Any]) -> Skeleton:
    """The architecture with these arguments. Raises TargetError when timm does not take them."""
    return _build(architecture, json.dumps(args, sort_keys=True))


@lru_cache(maxsize=64)
def _build(architecture: str, args: str) -> Skeleton:
    import timm
    import torch

    traits_of(architecture)
    arguments = json.loads(args)
    if loading := sorted(_LOADING & arguments.keys()):
        raise TargetError(f"`{loading[0]}` is no argument of an architecture: it loads weights or settings")
    try:
        with torch.device("meta"), _without_initialisation():
            model = timm.create_model(architecture, pretrained=False, **arguments)
    except Exception as error:  # whatever a constructor raises over its arguments
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise TargetError(f"timm's {architecture} does not take {given or 'its defaults'}: {reason}") from error
    specs = {
        name: TensorSpec(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in model.state_dict().items()
    }
    for missing in (name for name in ("num_classes", "num_features") if not hasattr(model, name)):
        setattr(model, missing, 0)  # one made with `features_only` has none, and timm's writer asks for it
    return Skeleton(architecture, arguments, specs, model.eval())


_FILLS = frozenset({"uniform_", "normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"})


def _without_initialisation() -> Any:
    """A mode in which the fills that initialise weights do nothing: two thirds of a build's time."""
    from torch.nn import Parameter
    from torch.overrides import TorchFunctionMode

    class WithoutInitialisation(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if getattr(func, "__name__", "") in _FILLS and args and (args[0].is_meta or isinstance(args[0], Parameter)):
                return args[0]
            return func(*args, **(kwargs or {}))

    return WithoutInitialisation()


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    return () if not value else (value,) if isinstance(value, str) else tuple(value)
