"""What the runners of torch models share: a checkpoint's state dict, a model filled with it, and what it answers.

Outputs: "0", "1", ... are what the model gives, in order, and where it names them the names are good too; any
other name is that of a module inside ("layer4"; "backbone.1" for the second of several tensors).
"""

from __future__ import annotations

import contextlib
import inspect
import pickle
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch_modules import Modules

__all__ = ["answering", "faithful_to", "fill", "filled", "flatten", "mend", "read_state", "settle"]

INERT = (  # what training logs and arguments leave in a checkpoint; objects that do nothing stand in for them
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.ndarray",
    "numpy.dtype",
    "argparse.Namespace",
    "pathlib.PosixPath",
)
LESS = (torch.float32, torch.float16, torch.bfloat16)


def read_state(job: Mapping[str, Any], key: str | None = None) -> dict[str, torch.Tensor]:
    """The state dict of the job's checkpoint, read by torch.load in its safe mode, or by safetensors.

    `key` is where the framework itself looks; what the user chose comes first, and where neither leads anywhere
    it is found as the converter found it, through the job's `wrappers`.
    """
    source = job["source"]
    found: Any = {}
    for path in source.get("files") or [source["file"]]:
        if not path.endswith(".json"):
            found = {**found, **_plain(_load(path, job.get("trust", False)))}
    if key in found and not source.get("chosen"):
        return _bare(_tensors(found[key]))
    for step in source.get("wrappers", ()):
        found = _without(found, step)
    return _bare(_tensors(found))


def fill(model: torch.nn.Module, state: Mapping[str, torch.Tensor], prefixes: Iterable[str] = ()) -> dict[str, Any]:
    """Load the weights, which may lie under one of `prefixes`. Raises ValueError if the model is not filled."""
    own = model.state_dict()
    prefix = max(["", *prefixes], key=lambda prefix: sum(prefix + name in state for name in own))
    missing, unexpected = model.load_state_dict(
        OrderedDict((name[len(prefix) :], value) for name, value in state.items() if name.startswith(prefix)),
        strict=False,
    )
    # counters and index tables fill themselves, and so does what the model throws away as it loads
    missing = [name for name in missing if own[name].is_floating_point() and prefix + name not in state]
    if missing:
        raise ValueError(f"the checkpoint does not fill the model: it lacks {_several(missing)}")
    outside = [name for name in state if not name.startswith(prefix)]
    return {"prefix": prefix, "unexpected": sorted(outside + [prefix + name for name in unexpected])}


def filled(model: torch.nn.Module, job: Mapping[str, Any], precision: str) -> tuple[Any, dict[str, Any]]:
    """A runner's `run` and facts, for a model that the checkpoint must fill and hold nothing beside."""
    facts = fill(model.to(getattr(torch, precision)), read_state(job))
    if facts["unexpected"]:
        raise ValueError(f"the checkpoint is of another model: it also has {_several(facts['unexpected'])}")
    return answering(model, job["outputs"]), facts


def answering(
    model: torch.nn.Module, names: Iterable[str], call: Callable[[torch.Tensor], Any] | None = None
) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    """`run` for a model: the outputs that it gives when called, and those that `names` asks of its modules."""
    settle()
    model.eval()
    inside: dict[str, np.ndarray] = {}
    modules = dict(model.named_modules())
    for module in modules.values():
        module.register_forward_pre_hook(_widen)
    for path in {name if name in modules else name.rpartition(".")[0] for name in names} & modules.keys() - {""}:
        modules[path].register_forward_hook(_listen(inside, path))

    def run(x: np.ndarray) -> dict[str, np.ndarray]:
        inside.clear()
        with torch.no_grad(), faithful_to(x.dtype):
            given = flatten((call or model)(torch.from_numpy(x)))
        return {**given, **inside}

    run.modules = Modules(model, run)  # type: ignore[attr-defined]
    return run


def _widen(module: torch.nn.Module, inputs: Any) -> Any:
    """What a model makes in float32 for itself, such as sines of positions, before it meets float64 weights."""
    if not any(parameter.dtype == torch.float64 for parameter in module.parameters(recurse=False)):
        return None
    return tuple(x.double() if isinstance(x, torch.Tensor) and x.dtype in LESS else x for x in inputs)


def mend(model: torch.nn.Module, places: Mapping[str, str]) -> None:
    """Let another module answer when one is called for the second time in a pass; `{i}` stands for a number."""
    modules, calls = dict(model.named_modules()), Counter[str]()
    model.register_forward_pre_hook(lambda _model, _inputs: calls.clear())

    def answer(name: str, other: torch.nn.Module) -> Callable[..., Any]:
        def hook(_module: torch.nn.Module, inputs: Any, _given: Any) -> Any:
            calls[name] += 1
            return other(*inputs) if calls[name] == 2 else None

        return hook

    for place, instead in places.items():
        number = place.replace("{i}", "#")
        pattern = re.escape(number).replace(re.escape("#"), r"(\d+)")
        for name in modules:
            found = re.search(rf"(^|\.){pattern}$", name)
            if found:
                other = name[: found.start(0)] + found[1] + instead.replace("{i}", found[2])
                modules[name].register_forward_hook(answer(name, modules[other]))


def _listen(inside: dict[str, np.ndarray], path: str) -> Callable[..., None]:
    def hook(_module: torch.nn.Module, _inputs: Any, given: Any) -> None:
        for name, array in flatten(given).items():
            inside.update({f"{path}.{name}": array, **({path: array} if name == "0" else {})})

    return hook


def flatten(given: Any) -> dict[str, np.ndarray]:
    """Tensors named by position; those in a dict or in a named output also by name, and nested ones with dots."""
    if isinstance(given, torch.Tensor):
        return {"0": given.numpy().copy()}  # the layers behind may work in place
    if not isinstance(given, (tuple, list, Mapping)):
        return {}
    flat: dict[str, np.ndarray] = {}
    items = list(given.items()) if isinstance(given, Mapping) else [(str(n), part) for n, part in enumerate(given)]
    for number, (name, part) in enumerate(items):
        for inner, array in flatten(part).items():
            ends = [""] if isinstance(part, torch.Tensor) else [f".{inner}"]
            flat.update({f"{own}{end}": array for own in (str(number), name) for end in ends})
    return flat


def settle() -> None:
    """Take no shortcut in float32, and the same way each time."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with contextlib.suppress(AttributeError, TypeError):  # old releases
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextlib.contextmanager
def faithful_to(dtype: Any) -> Iterator[None]:
    """Raises TypeError where a float64 forward pass goes on in less, as some models do in their softmax."""
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        yield
        return

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if getattr(result, "dtype", None) in LESS and any(
                getattr(arg, "dtype", None) == torch.float64 for arg in args
            ):
                raise TypeError(f"the model computes parts of it in {str(result.dtype)[6:]} ({func})")
            return result

    with Watch() if dtype == np.float64 else contextlib.nullcontext():
        yield


class _Inert:
    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def __setstate__(self, _state: Any) -> None: ...


def _load(path: str, trust: bool) -> Any:
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    if is_safetensors:
        from safetensors.torch import load_file

        return load_file(path)
    has_safe_mode = "weights_only" in inspect.signature(torch.load).parameters  # torch has it from 1.13 on
    if not (has_safe_mode or trust):
        raise ValueError(f"torch {torch.__version__} has no safe mode to load the checkpoint in; --trust does without")
    mode = {"weights_only": not trust} if has_safe_mode else {}
    parts = [name.rpartition(".") for name in INERT]
    stubs: list[Any] = [type(member, (_Inert,), {"__module__": module}) for module, _, member in parts]
    allow = getattr(torch.serialization, "safe_globals", contextlib.nullcontext)  # torch has it from 2.5 on
    try:
        with allow(stubs):
            return torch.load(path, map_location="cpu", **mode)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f", which would call {name[1]}" if name else ""
        raise ValueError(f"torch.load's safe mode refuses the checkpoint{what}; --trust allows it") from error


def _plain(found: Any) -> Any:
    """A saved model's own state dict; anything else as it is."""
    return found.state_dict() if isinstance(found, torch.nn.Module) else found


def _without(found: Mapping[str, Any], step: str) -> Mapping[str, Any]:
    """What one of the converter's wrappers holds: a dict, or names with a prefix, a segment or a mark."""
    inner = _plain(found.get(step))
    if isinstance(inner, Mapping):
        return inner
    marked = [name for name in found if step == "ema_" and f"ema_{name.replace('.', '_')}" in found]
    if marked:
        return {**found, **{name: found[f"ema_{name.replace('.', '_')}"] for name in marked}}
    prefix = step.rstrip(".") + "."
    below = {name[len(prefix) :]: value for name, value in found.items() if name.startswith(prefix)}
    if below:
        return below
    return {f".{name}".replace(f".{prefix}", ".")[1:]: value for name, value in found.items()}


def _tensors(found: Any) -> dict[str, torch.Tensor]:
    return OrderedDict((name, value) for name, value in _plain(found).items() if isinstance(value, torch.Tensor))


def _bare(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Without what DistributedDataParallel puts before every name."""
    return OrderedDict((name[7:] if name.startswith("module.") else name, value) for name, value in state.items())


def _several(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
