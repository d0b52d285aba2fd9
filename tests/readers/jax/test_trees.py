"""A training state's weights go by their modules' names, whatever it keeps them in."""

from __future__ import annotations

from typing import Any

import pytest

from converters.readers.jax.trees import Arranged, arrange
from converters.tensors import LazyTensor, TensorSpec

OPTIMIZER, STEP, RANDOM = "optimizer state", "step counter", "random generator state"

CASES: dict[str, tuple[str, str, tuple[str, ...], dict[str, str]]] = {  # held, found, wrappers, set aside
    "bare": ("cls head/kernel", "cls head/kernel", (), {}),
    "params": ("params/cls params/head/kernel", "cls head/kernel", ("params",), {}),
    "statistics": (
        "params/bn/scale batch_stats/bn/mean",
        "bn/scale bn/mean",
        ("params + batch_stats",),
        {},
    ),
    "one name twice": (
        "params/bn/mean batch_stats/bn/mean",
        "params/bn/mean batch_stats/bn/mean",
        (),
        {},
    ),
    "a training state": (
        "step params/w opt_state/0/mu/w batch_stats/m rng",
        "w m",
        ("params + batch_stats",),
        {"step": STEP, "opt_state/**": OPTIMIZER, "rng": RANDOM},
    ),
    "an optimizer's target": ("opt/target/w opt/state/step", "w", ("opt", "target"), {"opt/**": OPTIMIZER}),
    "an optimizer that is all there is": ("target/w state/step", "w", ("target",), {"state/**": OPTIMIZER}),
    "what training keeps beside": (
        "opt/target/w opt/state/step extra/time",
        "w",
        ("opt", "target"),
        {"opt/**": OPTIMIZER, "extra/**": "counters and times of the training"},
    ),
    "nothing but a target": ("opt/target/w", "w", ("opt", "target"), {}),
    "an optimizer's target with collections": (
        "optimizer/target/params/w optimizer/state/s model_state/batch_stats/bn/mean global_step",
        "w bn/mean",
        ("optimizer", "target + model_state"),
        {"optimizer/**": OPTIMIZER, "global_step": STEP},
    ),
    "an optimizer beside": ("params/w opt/0/w", "w", ("params",), {"opt/**": OPTIMIZER}),
    "a state in a state": ("state/params/w state/step", "w", ("state", "params"), {"step": STEP}),
    "another collection": ("params/w cache/w", "params/w cache/w", (), {}),
    "an optimizer alone": ("opt/mu/w", "opt/mu/w", (), {}),
    "a module called step": ("step/kernel head/kernel", "step/kernel head/kernel", (), {}),
    "nnx": ("a/kernel/value a/rngs/key/value", "a/kernel", ("/value",), {"**/rngs/**": RANDOM}),
    "values of some": ("a/value b", "a/value b", (), {}),
    "params in itself": ("params/params/w", "w", ("params", "params"), {}),
    "a tensor called params": ("params", "params", (), {}),
    "nothing": ("", "", (), {}),
}


def tensors(names: str) -> dict[str, Any]:
    return {name: LazyTensor(TensorSpec(name, (), "float32"), lambda: memoryview(bytes(4))) for name in names.split()}


@pytest.mark.parametrize("case", CASES)
def test_arrange(case: str) -> None:
    held, found, wrappers, set_aside = CASES[case]
    arranged = arrange({**tensors(held), "epoch": 3})
    assert list(arranged.tree) == ["epoch", *found.split()]
    assert (arranged.wrappers, arranged.set_aside) == (wrappers, set_aside)


def contents(arranged: Arranged) -> dict[str, list[str]]:
    return {top: list(names) for top, names in arranged.tree.items()}


def test_averaged_weights_stand_beside_the_raw_ones() -> None:
    for averaged in ("ema_params", "params_ema", "averaged_params"):
        arranged = arrange(tensors(f"params/w batch_stats/m {averaged}/w step"))
        assert contents(arranged) == {"params": ["w", "m"], averaged: ["w", "m"]}
        assert arranged.set_aside == {"step": STEP}
    arranged = arrange(tensors("params/w batch_stats/m ema_params/w ema_batch_stats/n"))
    assert contents(arranged) == {"params": ["w", "m"], "ema_params": ["w", "n"]}
