from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.emitter import write_tensors
from converters.errors import CheckpointError, DamagedCheckpoint, OutputError
from converters.folders import new_folder
from converters.plan import make_plan
from converters.readers.files import SourceFile
from converters.routes import route
from converters.target import Skeleton
from converters.tensors import DTYPES, LazyTensor, TensorSpec

Tensors = dict[str, torch.Tensor]


def random(dtype: str, *shape: int) -> torch.Tensor:
    """Random bits, so that every byte matters."""
    generator = torch.Generator().manual_seed(len(dtype) + sum(shape))
    if dtype == "bool":
        return torch.rand(shape, generator=generator) < 0.5
    width = DTYPES[dtype][1]
    size = (*shape[:-1], shape[-1] * width) if shape else (width,)
    bits = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return bits.view(getattr(torch, dtype)).reshape(shape)


@pytest.fixture
def emit(family, checkpoint, tmp_path) -> Callable[..., Path]:
    """Write tensors through a family's rows; by default each keeps its name."""

    def write(tensors: Tensors, targets: Tensors | None = None, rules: str = "'{*}': '{*}'", **options: Any) -> Path:
        mapping = family(f"rules:\n  {rules}\n")
        source = checkpoint(tensors, files=options.pop("files", ()))
        specs = checkpoint(targets or tensors).specs
        plan = make_plan(mapping, route(mapping, source.specs), Skeleton("tiny", {}, specs, None))
        path = tmp_path / "model.safetensors"
        path.unlink(missing_ok=True)
        write_tensors(plan, source, path, allow_nan=True, **options)  # random bits are NaN at times
        return path

    return write


EVERY_KIND = {
    **{f"of.{dtype}": random(dtype, 3, 5) for dtype in DTYPES},
    **{f"scalar.{dtype}": random(dtype) for dtype in ("float32", "int64", "bool", "bfloat16")},
    "empty.float": torch.zeros(0, 3),
    "empty.bool": torch.zeros(2, 0, dtype=torch.bool),
    "größe.重み.🙂": random("float32", 2),
    'quoted."\\.\x01\x7f\u2028': random("float16", 3),
    "z.last": random("float64", 1),
    "Z.capital": random("float64", 1),
}


@pytest.mark.parametrize(
    "tensors",
    [
        EVERY_KIND,
        dict(reversed(EVERY_KIND.items())),
        {"a": torch.zeros(0)},
        *({"a" * n: torch.ones(1)} for n in range(1, 9)),
    ],
    ids=["every dtype", "another order", "nothing", *(f"padding{n}" for n in range(8))],
)
def test_bytes_are_those_of_safetensors(emit, tmp_path, tensors):
    path = emit(tensors)
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    assert path.read_bytes() == (tmp_path / "expected").read_bytes()


def test_two_runs_write_the_same(emit):
    first = emit(EVERY_KIND).read_bytes()
    assert emit(EVERY_KIND).read_bytes() == first


def test_ops_run_on_the_way(emit):
    kernel, bias = torch.randn(4, 6), torch.randn(6)
    path = emit(
        {"a.kernel": kernel, "a.bias": bias},
        {
            "p.kernel": torch.empty(3, 4),
            "q.kernel": torch.empty(3, 4),
            "p.bias": torch.empty(3),
            "q.bias": torch.empty(3),
        },
        rules="a.kernel: '{p|q}.kernel | i o -> o i | chunk'\n  a: '{p|q} | chunk'",
    )
    found = load_file(path)
    assert torch.equal(torch.cat([found["p.kernel"], found["q.kernel"]]), kernel.T)
    assert torch.equal(torch.cat([found["p.bias"], found["q.bias"]]), bias)


def test_a_gather_and_a_fill(family, checkpoint, tmp_path):
    mapping = family("rules:\n  '{q|k}': x | cat\nfill: {x.n: 7, x.s: 0.5, x.k: identity}")
    tensors = {"k.w": torch.full((2,), 2.0), "q.w": torch.full((2,), 1.0)}
    targets = {"x.w": torch.empty(4), "x.n": torch.tensor(0), "x.s": torch.empty(2), "x.k": torch.empty(3, 3, 3, 5)}
    source = checkpoint(tensors)
    skeleton = Skeleton("tiny", {}, checkpoint(targets).specs, None)
    write_tensors(make_plan(mapping, route(mapping, source.specs), skeleton), source, tmp_path / "a", dtype="bfloat16")
    found = load_file(tmp_path / "a")
    assert found["x.w"].tolist() == [1, 1, 2, 2]
    assert (found["x.n"].item(), found["x.n"].dtype) == (7, torch.int64)
    assert (found["x.s"].tolist(), found["x.s"].dtype) == ([0.5, 0.5], torch.bfloat16)
    image = torch.arange(1.0, 106).reshape(1, 3, 5, 7)
    assert torch.equal(torch.conv2d(image, found["x.k"].float(), padding=(1, 2)), image)


FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")


@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("given", FLOATS)
def test_casts_are_torchs(emit, given, wanted):
    torch.manual_seed(1)  # torch rounds float64 by way of float32, which may go wrong, but not with these
    tensor = (torch.randn(1000, dtype=torch.float64) * 10.0 ** torch.randint(-9, 4, (1000,))).to(getattr(torch, given))
    tensor[:3] = torch.tensor([float("nan"), 0.0, -0.0]).to(tensor.dtype)
    found = load_file(emit({"a": tensor, "n": torch.tensor([1, 2])}, dtype=wanted))
    expected = tensor.to(getattr(torch, wanted))
    assert found["a"].dtype == expected.dtype
    assert torch.equal(found["a"].view(torch.uint8), expected.view(torch.uint8))
    assert found["n"].dtype == torch.int64


def test_integers_and_complex_numbers_are_never_cast(emit):
    tensors = {
        "n": torch.tensor([2**40]),
        "c": torch.tensor([1e-300 + 2j], dtype=torch.complex64),
        "b": torch.tensor([True]),
    }
    found = load_file(emit(tensors, dtype="float16"))
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_a_value_that_overflows_is_refused(emit):
    with pytest.raises(OutputError) as caught:
        emit({"a.w": torch.tensor([1.0, 70000.0, -1e9])}, dtype="float16")
    assert str(caught.value) == "a.w: 2 values do not fit float16; try --dtype bfloat16 or float32"
    infinite = torch.tensor([float("inf"), float("-inf"), 65504.0])
    assert torch.equal(load_file(emit({"a.w": infinite}, dtype="float16"))["a.w"].float(), infinite)


def test_a_fill_that_overflows_is_refused(family, checkpoint, tmp_path):
    mapping = family("rules: {a: b}\nfill: {f: 1000000}")
    source = checkpoint({"a": torch.ones(1)})
    skeleton = Skeleton("tiny", {}, checkpoint({"b": torch.ones(1), "f": torch.ones(2)}).specs, None)
    with pytest.raises(OutputError, match="f: 2 values do not fit float16"):
        write_tensors(
            make_plan(mapping, route(mapping, source.specs), skeleton), source, tmp_path / "a", dtype="float16"
        )


def test_a_fill_may_be_computed(family, checkpoint, tmp_path):
    mapping = family("rules: {a: b}\nfill: {p: sincos2d}")
    source, square = checkpoint({"a": torch.ones(1)}), torch.arange(9)
    for places, name in ((9, "a"), (8, "b")):
        targets = checkpoint({"b": torch.ones(1), "p": torch.ones(1, places, 12)})
        plan = make_plan(mapping, route(mapping, source.specs), Skeleton("tiny", {}, targets.specs, None))
        if name == "b":
            with pytest.raises(OutputError, match="p: sincos2d wants a square grid and a width in fours, not 8 places"):
                write_tensors(plan, source, tmp_path / name)
            return
        write_tensors(plan, source, tmp_path / name)
        found = load_file(tmp_path / name)["p"][0]
        for column, place in enumerate((square % 3, square // 3)):  # x, then y; angles of 1, 1/100 and 1/10000
            angles = place[:, None] * torch.tensor([1, 1e-2, 1e-4], dtype=torch.float64)
            wanted = torch.cat([angles.sin(), angles.cos()], 1).float()
            assert torch.equal(found[:, 6 * column : 6 * column + 6], wanted)


def test_the_layers_of_stacks_are_written_apart(family, checkpoint, tmp_path):
    mapping = family("rules:\n  'b.{i}.{q|k}': c.{i} | cat\nunstack: {b: 'b.{i}'}")
    tensors = {"b.k.w": torch.arange(6.0).reshape(2, 3), "b.q.w": torch.arange(6.0, 12.0).reshape(2, 3)}
    source, targets = checkpoint(tensors), checkpoint({"c.0.w": torch.empty(6), "c.1.w": torch.empty(6)})
    skeleton = Skeleton("tiny", {}, targets.specs, None)
    write_tensors(make_plan(mapping, route(mapping, source.specs), skeleton), source, tmp_path / "a")
    found = load_file(tmp_path / "a")
    assert found["c.0.w"].tolist() == [6, 7, 8, 0, 1, 2] and found["c.1.w"].tolist() == [9, 10, 11, 3, 4, 5]


def test_each_source_is_read_once_in_the_order_of_the_file(family, checkpoint, tmp_path):
    mapping = family("rules:\n  in: 'to.{q|k|v} | chunk'\n  '{c|b}': x | cat\n  '{*}': '{*}'\ndrop: {d: r}")
    tensors = {
        "z": torch.ones(1),
        "in": torch.ones(6),
        "d": torch.ones(1),
        "b": torch.ones(1),
        "a": torch.ones(1),
        "c": torch.ones(1),
    }
    reads: list[str] = []

    def counted(tensor: LazyTensor) -> LazyTensor:
        return replace(tensor, read=lambda: (reads.append(tensor.spec.name), tensor.read())[1])

    source = checkpoint(tensors)
    source = replace(source, tensors={name: counted(tensor) for name, tensor in source.tensors.items()})
    targets = {"z": (1,), "a": (1,), "x": (2,), **{f"to.{x}": (2,) for x in "qkv"}}
    specs = {name: TensorSpec(name, shape, "float32") for name, shape in targets.items()}
    seen: list[tuple[int, int]] = []
    plan = make_plan(mapping, route(mapping, source.specs), Skeleton("tiny", {}, specs, None))
    write_tensors(plan, source, tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert reads == ["z", "in", "c", "b", "a"]
    assert Counter(reads).most_common(1)[0][1] == 1
    assert seen[-1] == (sum(spec.nbytes for spec in specs.values()),) * 2


def test_bytes_that_stay_as_they_are_are_copied(family, checkpoint, tmp_path):
    """Only what an op or a cast changes passes through memory."""
    mapping = family("rules:\n  turned: 'turned | o i -> i o'\n  '{*}': '{*}'")
    tensors = {
        "turned": torch.randn(2, 3),
        "same": torch.randn(5),
        "count": torch.tensor([3]),
        "half": torch.ones(2).half(),
    }
    copied: list[str] = []

    def copying(tensor: LazyTensor) -> LazyTensor:
        def copy(file: int, offset: int) -> None:
            copied.append(tensor.spec.name)
            os.pwrite(file, tensor.read(), offset)

        return replace(tensor, copy=copy)

    source = checkpoint(tensors)
    source = replace(source, tensors={name: copying(tensor) for name, tensor in source.tensors.items()})
    targets = checkpoint({**tensors, "turned": tensors["turned"].T}).specs
    plan = make_plan(mapping, route(mapping, source.specs), Skeleton("tiny", {}, targets, None))
    seen: list[tuple[int, int]] = []
    write_tensors(plan, source, tmp_path / "source", progress=lambda done, total: seen.append((done, total)))
    assert copied == ["same", "count", "half"]
    expected = {**tensors, "turned": tensors["turned"].T.contiguous()}
    save_file(expected, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "source").read_bytes() == (tmp_path / "expected").read_bytes()
    assert seen[-1] == (sum(spec.nbytes for spec in targets.values()),) * 2
    copied.clear()
    write_tensors(plan, source, tmp_path / "float16", dtype="float16")
    assert copied == ["count", "half"]
    assert load_file(tmp_path / "float16")["same"].tolist() == tensors["same"].half().tolist()


def damaged() -> memoryview:
    raise DamagedCheckpoint("its CRC differs", file="source.pth", tensor="b")


def no_space(*_: Any) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def small(family, checkpoint) -> Callable[..., None]:
    """Write a folder with two tensors, as `convert` does; the second reader may fail."""

    def write(destination: Path, read: Callable[[], memoryview] | None = None, overwrite: bool = False) -> None:
        mapping = family("rules: {'{*}': '{*}'}")
        source = checkpoint({"a": torch.ones(3), "b": torch.ones(3)})
        source.tensors["b"] = replace(source.tensors["b"], read=read or source.tensors["b"].read)
        plan = make_plan(mapping, route(mapping, source.specs), Skeleton("tiny", {}, source.specs, None))
        with new_folder(destination, overwrite) as folder:
            write_tensors(plan, source, folder / "model.safetensors")
            (folder / "conversion.json").write_text("{}")

    return write


def state(path: Path) -> tuple[object, ...]:
    """What a write would change; a look changes the time of access."""
    found = path.stat()
    return found.st_ino, found.st_mode, found.st_size, path.is_file() and (found.st_mtime_ns, path.read_bytes())


def interrupted() -> memoryview:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("read", "patch", "expected"),
    [
        (damaged, None, (CheckpointError, "source.pth: b: its CRC differs")),
        (None, "pwrite", (OutputError, "out: cannot be written: No space left on device")),
        (None, "posix_fallocate", (OutputError, "out: cannot be written: No space left on device")),
        (None, "fsync", (OutputError, "out: cannot be written: No space left on device")),
        (lambda: memoryview(bytearray(4)), None, (AssertionError, "b: 4 bytes")),
        (interrupted, None, (KeyboardInterrupt, None)),
    ],
    ids=[
        "a damaged source",
        "a full disk",
        "a disk too small",
        "a full disk at the flush",
        "a reader that lies",
        "Ctrl-C",
    ],
)
def test_a_failure_leaves_nothing(small, tmp_path, monkeypatch, read, patch, expected):
    place = tmp_path / "place"
    place.mkdir()
    if patch:
        monkeypatch.setattr(f"converters.emitter.os.{patch}", no_space)
    with pytest.raises(expected[0], match=expected[1]):
        small(place / "out", read)
    assert list(place.iterdir()) == []


def test_a_failure_leaves_the_old_conversion(small, tmp_path):
    place = tmp_path / "place"
    small(place / "out")
    before = state(place / "out" / "model.safetensors")
    with pytest.raises(CheckpointError):
        small(place / "out", damaged, overwrite=True)
    assert [path.name for path in place.iterdir()] == ["out"]
    assert state(place / "out" / "model.safetensors") == before


def test_a_rename_that_fails_brings_the_old_conversion_back(small, tmp_path, monkeypatch):
    place = tmp_path / "place"
    small(place / "out")
    real, calls = Path.rename, []

    def second_fails(self: Path, target: Any) -> Path:
        calls.append(self)
        if len(calls) == 2:
            no_space()
        return real(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with pytest.raises(OutputError, match="No space"):
        small(place / "out", overwrite=True)
    assert [path.name for path in place.iterdir()] == ["out"]
    assert (place / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("mask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640), (0o077, 0o700, 0o600)]
)
def test_modes_follow_the_umask(small, tmp_path, mask, folder, file):
    old = os.umask(mask)
    try:
        small(tmp_path / "out")
        assert os.umask(mask) == mask
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == folder
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {file}


@pytest.fixture
def there(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Whatever may stand where a folder is to be written."""
    for name, files in {
        "conversion": ["model.safetensors", "config.json", "conversion.json", "README.md", "verification.json"],
        "empty": [],
        "project": ["README.md"],
        "somebody's": ["model.safetensors", "config.json"],
        "mixed": ["model.safetensors", "conversion.json", "thesis.tex"],
    }.items():
        (tmp_path / name).mkdir()
        for file in files:
            (tmp_path / name / file).write_text("old")
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "conversion")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    return {path.name: path for path in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("name", "overwrite", "problem"),
    [
        ("new", False, None),
        ("deep/er/new", True, None),
        ("empty", False, None),
        ("conversion", True, None),
        ("conversion", False, "is there already; choose another name, or pass --overwrite"),
        ("project", True, "is not an earlier conversion; choose another name"),
        ("somebody's", True, "is not an earlier conversion; choose another name"),
        ("mixed", True, "holds other files too (thesis.tex); choose another name"),
        ("file", True, "is there already and is no folder; choose another name"),
        ("link", True, "is there already and is no folder; choose another name"),
        ("dangling", True, "is there already and is no folder; choose another name"),
        ("file/new", False, "cannot be written: "),
        ("n" * 300, False, "cannot be written: File name too long"),
    ],
)
def test_destinations(small, tmp_path, there, name, overwrite, problem):
    before = {path: state(path) for path in tmp_path.rglob("*") if path.exists()}
    if problem is None:
        small(tmp_path / name, overwrite=overwrite)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["conversion.json", "model.safetensors"]
        return
    with pytest.raises(OutputError) as caught:
        small(tmp_path / name, overwrite=overwrite)
    assert str(caught.value).startswith(f"{str(tmp_path / name)[:200]}")
    assert problem in str(caught.value)
    after = {path: state(path) for path in tmp_path.rglob("*") if path.exists() and path.suffix != ".yaml"}
    assert after == before


def test_a_source_that_changes_is_refused(emit, tmp_path):
    path = tmp_path / "source.bin"
    path.write_bytes(b"one")
    file = SourceFile(path)
    path.write_bytes(b"another")
    with pytest.raises(CheckpointError, match="was written to while it was read"):
        emit({"a": torch.ones(1)}, files=(file,))
