"""Families, checkpoints and targets small enough to write down in a test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from converters.readers import Checkpoint
from converters.tensors import LazyTensor, TensorSpec

HEAD = "targets: {resnet18: }\ndetect: ['*']\nleaves: torch\n"  # what a test's own text stands behind, from line 4


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist looks for groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `--dist loadgroup` the tests of a file run in one process, those marked `alone` anywhere."""
    for item in items:
        if not item.get_closest_marker("alone"):
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., Any]:
    """A mapping from its text; `head` are the keys that every file must have."""
    from converters.mapping import load_mapping

    def write(text: str, head: str = HEAD) -> Any:
        path = tmp_path / f"family{len(list(tmp_path.iterdir()))}.yaml"
        path.write_text(head + text, "utf-8")
        return load_mapping(str(path))

    return write


@pytest.fixture(scope="session")
def specs() -> Callable[[str], dict[str, TensorSpec]]:
    """`a.weight=2x3 a.count=:int64` as specs; float32 where no dtype is given."""
    return read_specs


@pytest.fixture
def plan(family: Callable[..., Any]) -> Callable[..., Any]:
    """The plan of a family's text, or its problems, for sources and targets written as `specs` takes them."""
    from converters.plan import make_plan
    from converters.routes import route
    from converters.target import Skeleton

    def make(text: str, sources: str, targets: str, head: str = HEAD) -> Any:
        mapping = family(text, head)
        return make_plan(mapping, route(mapping, read_specs(sources)), Skeleton("tiny", {}, read_specs(targets), None))

    return make


@pytest.fixture(scope="session")
def checkpoint() -> Callable[..., Checkpoint]:
    """A checkpoint that holds these torch tensors, or zeros for specs."""

    def hold(tensors: Mapping[str, Any], path: str = "source.pth", **more: Any) -> Checkpoint:
        return Checkpoint(Path(path), "made up", {name: lazy(name, given) for name, given in tensors.items()}, **more)

    return hold


def lazy(name: str, given: Any) -> LazyTensor:
    if isinstance(given, TensorSpec):
        return LazyTensor(given, lambda: memoryview(bytearray(given.nbytes)))
    from converters.tensors import from_torch

    spec = TensorSpec(name, tuple(given.shape), str(given.dtype).removeprefix("torch."))
    return LazyTensor(spec, lambda: memoryview(bytearray(from_torch(given))))


def read_specs(text: str) -> dict[str, TensorSpec]:
    found = {}
    for part in text.split():
        name, _, rest = part.partition("=")
        shape, _, dtype = rest.partition(":")
        found[name] = TensorSpec(name, tuple(map(int, filter(None, shape.split("x")))), dtype or "float32")
    return found
