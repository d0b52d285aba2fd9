"""Faults: the ways in which conversions go wrong, done to a timm model on purpose.

    channels swapped        two output channels of a weight
    kernel transposed       a square kernel, height for width
    matrix transposed       a weight with as many outputs as inputs
    q and k exchanged       in an attention
    eps times 100           in all norms of a type
    bias dropped            zero instead
    statistics exchanged    between two batch norms of one width
    rounded once more       a weight, through bfloat16 or float16

A kind knows the places of a model where it can be done, from first to last, by names and shapes alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

__all__ = ["KINDS", "Fault", "Kind", "applied"]

KEYS = {"q": "k", "q_proj": "k_proj", "query": "key", "to_q": "to_k", "wq": "wk"}  # modules beside each other


@dataclass(frozen=True)
class Fault:
    """What is to be changed in a model."""

    tensor: str  # where, as a report says it
    detail: str
    values: dict[str, Any] = field(default_factory=dict)  # other tensors for these names of the state dict
    eps: dict[str, float] = field(default_factory=dict)  # another eps for these modules

    def tensors(self, model: Any) -> set[str]:
        """Those that it is about: with an eps, its module's."""
        return {name for name in model.state_dict() if name in self.values or name.rpartition(".")[0] in self.eps}

    def changes(self, model: Any) -> bool:
        """Whether the model would not be the same, bit for bit."""
        import torch

        state, modules = model.state_dict(), dict(model.named_modules())
        return any(not torch.equal(state[name], value) for name, value in self.values.items()) or any(
            modules[name].eps != eps for name, eps in self.eps.items()
        )


@contextmanager
def applied(fault: Fault, models: Iterable[Any]) -> Iterator[None]:
    """The models with the fault; afterwards they are what they were."""
    import torch

    undo: list[Callable[[], Any]] = []
    with torch.no_grad():
        for model in models:
            state, modules = model.state_dict(), dict(model.named_modules())
            for name, value in fault.values.items():
                undo.append(partial(state[name].copy_, state[name].clone()))
                state[name].copy_(value)
            for name, eps in fault.eps.items():
                undo.append(partial(setattr, modules[name], "eps", modules[name].eps))
                modules[name].eps = eps
        try:
            yield
        finally:
            for step in undo:
                step()


def _weights(model: Any) -> dict[str, Any]:
    """Those of convolutions and matrices."""
    return {name: v.detach() for name, v in model.named_parameters() if name.endswith("weight") and v.ndim > 1}


def _rows(model: Any) -> list[str]:
    return [name for name, value in _weights(model).items() if len(value) > 1]


def _swap_channels(model: Any, name: str, rng: np.random.Generator) -> Fault:
    value = _weights(model)[name].clone()
    one, other = sorted(map(int, rng.choice(len(value), 2, replace=False)))
    value[[one, other]] = value[[other, one]]
    return Fault(name, f"{one} and {other}", {name: value})


def _kernels(model: Any) -> list[str]:
    return [name for name, v in _weights(model).items() if v.ndim == 4 and v.shape[2] == v.shape[3] > 1]


def _transpose_kernel(model: Any, name: str, rng: np.random.Generator) -> Fault:
    value = _weights(model)[name]
    return Fault(name, "x".join(map(str, value.shape[2:])), {name: value.mT.clone()})


def _matrices(model: Any) -> list[str]:
    return [name for name, v in _weights(model).items() if v.shape[0] == v.shape[1] > 1]


def _transpose_matrix(model: Any, name: str, rng: np.random.Generator) -> Fault:
    value = _weights(model)[name]
    return Fault(name, "x".join(map(str, value.shape)), {name: value.transpose(0, 1).clone()})


def _queries(model: Any) -> list[str]:
    """Modules that make queries: `qkv`, together with the rest, or `q` beside a `k` of the same shape."""
    modules = {name.removesuffix(".weight"): value for name, value in _weights(model).items()}
    fused = {name for name, v in modules.items() if name.split(".")[-1] == "qkv" and len(v) % 3 == 0}
    return [n for n, v in modules.items() if n in fused or getattr(modules.get(_key(n)), "shape", None) == v.shape]


def _key(query: str) -> str:
    parent, dot, module = query.rpartition(".")
    return parent + dot + KEYS.get(module, "?")


def _exchange_query_and_key(model: Any, name: str, rng: np.random.Generator) -> Fault:
    state, key = model.state_dict(), _key(name)
    leaves = [leaf for leaf in ("weight", "bias") if f"{name}.{leaf}" in state]
    if f"{key}.weight" in state:
        pairs = [(f"{a}.{leaf}", f"{b}.{leaf}") for leaf in leaves for a, b in ((name, key), (key, name))]
        return Fault(name, f"with {key}", {one: state[other].clone() for one, other in pairs if one in state})
    thirds = {f"{name}.{leaf}": state[f"{name}.{leaf}"].chunk(3) for leaf in leaves}
    return Fault(name, "the first third with the second", {n: _cat(k, q, v) for n, (q, k, v) in thirds.items()})


def _cat(*parts: Any) -> Any:
    import torch

    return torch.cat(parts)


def _norm_types(model: Any) -> list[str]:
    return list(dict.fromkeys(type(m).__name__ for m in model.modules() if isinstance(getattr(m, "eps", None), float)))


def _multiply_eps(model: Any, kind: str, rng: np.random.Generator) -> Fault:
    eps = {name: module.eps for name, module in model.named_modules() if type(module).__name__ == kind}
    values = ", ".join(f"{value:g}" for value in sorted(set(eps.values())))
    return Fault(kind, f"{values}, in {len(eps)}", eps={name: 100 * value for name, value in eps.items()})


def _biases(model: Any) -> list[str]:
    return [name for name, value in model.named_parameters() if name.endswith("bias") and value.any()]


def _drop_bias(model: Any, name: str, rng: np.random.Generator) -> Fault:
    value = model.get_parameter(name).detach()
    return Fault(name, f"{value.numel()} values", {name: value.new_zeros(value.shape)})


def _neighbours(model: Any) -> dict[str, str]:
    """Batch norms, each with the next one of its width."""
    alike: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if getattr(module, "running_var", None) is not None:
            alike.setdefault(len(module.running_var), []).append(name)
    following = {one: other for names in alike.values() for one, other in pairwise(names)}
    return {name: following[name] for name, _ in model.named_modules() if name in following}


def _exchange_statistics(model: Any, name: str, rng: np.random.Generator) -> Fault:
    state, other = model.state_dict(), _neighbours(model)[name]
    pairs = [(a, b, leaf) for leaf in ("running_mean", "running_var") for a, b in ((name, other), (other, name))]
    return Fault(name, f"with {other}", {f"{a}.{leaf}": state[f"{b}.{leaf}"].clone() for a, b, leaf in pairs})


def _round(model: Any, name: str, rng: np.random.Generator) -> Fault:
    import torch

    value, dtype = _weights(model)[name], str(rng.choice(["bfloat16", "float16"]))
    return Fault(name, f"through {dtype}", {name: value.to(getattr(torch, dtype)).to(value.dtype)})


@dataclass(frozen=True)
class Kind:
    """One kind of fault: where a model can have it, how it is done there, and how often it is tried."""

    name: str
    places: Callable[[Any], Iterable[str]]
    damage: Callable[[Any, str, np.random.Generator], Fault]
    times: int | None = 1  # None: at every place


KINDS = (
    Kind("channels swapped", _rows, _swap_channels, 3),
    Kind("kernel transposed", _kernels, _transpose_kernel),
    Kind("matrix transposed", _matrices, _transpose_matrix),
    Kind("q and k exchanged", _queries, _exchange_query_and_key),
    Kind("eps times 100", _norm_types, _multiply_eps, None),
    Kind("bias dropped", _biases, _drop_bias, 2),
    Kind("statistics exchanged", _neighbours, _exchange_statistics),
    Kind("rounded once more", _weights, _round),
)
