"""The emitter: a plan and a checkpoint become the `model.safetensors` that timm loads.

It is written header first, then tensor by tensor at the places that the header gives: those that stay as they are
go from file to file, the others through their ops, read ahead by one origin. While it is flushed to the disk, its
values are looked at, and it is read back by the safetensors library.
"""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from converters.calculations import constant
from converters.dropped import check_dropped
from converters.errors import CheckpointError, OutputError
from converters.ops import OpError
from converters.plan import Plan, Step
from converters.readers import Checkpoint
from converters.soundness import find_fault
from converters.tensors import DTYPES, LazyTensor, TensorSpec, from_torch, to_torch

__all__ = ["write_tensors"]

AT_ONCE = 128 << 20  # bytes that are flushed


def write_tensors(
    plan: Plan,
    checkpoint: Checkpoint,
    path: Path,
    *,
    dtype: str = "source",
    allow_nan: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """`path` as safetensors: the plan's targets, in the source's dtype or in another float dtype, rounded once.

    What is copied from file to file is only as sound as `checkpoint.sha256()` finds it. `progress` is called
    with the bytes written and the bytes in all. Raises CheckpointError when the source is damaged or, without
    `allow_nan`, has values with which nothing can be computed; OutputError when a value overflows the dtype.
    """
    specs = {step.target.name: _emitted(step.target, dtype) for step in plan.steps}
    header, places = _layout(specs)
    copied, computed = _divide(plan, checkpoint, specs)
    least = _least_variances(plan)
    start, done, total = len(header), 0, sum(spec.nbytes for spec in specs.values())

    def written() -> Iterator[str]:
        for name, tensor in copied.items():
            tensor.copy(file, start + places[name])  # type: ignore[misc]
            yield name
        for step, raw in _contents(computed, checkpoint, specs):
            assert raw.nbytes == specs[step.target.name].nbytes, f"{step.target.name}: {raw.nbytes} bytes"
            _write(file, raw, start + places[step.target.name])
            yield step.target.name

    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
    try:
        _reserve(file, len(header) + total)
        _write(file, memoryview(header), 0)
        with _flush_behind(file) as flush, ThreadPoolExecutor(1) as reader:
            faults = {}
            for name in written():
                spec = specs[name]
                if not allow_nan:
                    faults[name] = reader.submit(find_fault, file, start + places[name], spec, least.get(name))
                done += spec.nbytes
                flush(spec.nbytes)
                if progress:
                    progress(done, total)
    finally:
        os.close(file)
    _check_values(plan, checkpoint, {name: fault for name, one in faults.items() if (fault := one.result())})
    check_dropped(plan, checkpoint)
    for source in checkpoint.files:
        source.check_unchanged()
    _read_back(path, specs)


@contextmanager
def _flush_behind(file: int) -> Iterator[Callable[[int], None]]:
    """Brings a file to the disk while it is written, so that little is left to flush when it is whole.

    It is to be told how many bytes were written, and raises OSError where the disk fails.
    """
    flush, dirty = getattr(os, "fdatasync", os.fsync), 0
    with ThreadPoolExecutor(1) as disk:
        last = disk.submit(lambda: None)

        def advance(count: int) -> None:
            nonlocal dirty, last
            dirty += count
            if dirty >= AT_ONCE and last.done():
                last.result()
                dirty, last = 0, disk.submit(flush, file)

        yield advance
        last.result()


def _check_values(plan: Plan, checkpoint: Checkpoint, faults: dict[str, str]) -> None:
    """Refuse tensors with which nothing can be computed."""
    for step in plan.steps:
        if step.target.name in faults:
            more = f" (and {len(faults) - 1} more tensors do)" if len(faults) > 1 else ""
            raise CheckpointError(
                faults[step.target.name] + more,
                file=checkpoint.path,
                tensor=(step.origin.sources or (step.target.name,))[-1],
                cure="take an earlier checkpoint, or pass --allow-nan to have it so",
            )


def _least_variances(plan: Plan) -> dict[str, float]:
    """What each variance has to exceed: below, its square root is none."""
    modules = plan.skeleton.model.named_modules() if plan.skeleton.model else ()
    return {f"{name}.running_var": -float(one.eps) for name, one in modules if hasattr(one, "running_var")}


def _divide(
    plan: Plan, checkpoint: Checkpoint, specs: dict[str, TensorSpec]
) -> tuple[dict[str, LazyTensor], list[list[Step]]]:
    """Targets whose bytes stand in a file as they are, and the other steps by origin; both in the source's order."""
    place = {name: index for index, name in enumerate(checkpoint.tensors)}
    groups = sorted(
        plan.origins.values(), key=lambda steps: min(map(place.__getitem__, steps[0].origin.sources), default=-1)
    )
    copied: dict[str, LazyTensor] = {}
    computed: list[list[Step]] = []
    for steps in groups:
        source = _unchanged(steps, checkpoint, specs)
        if source and source.copy:
            copied[steps[0].target.name] = source
        else:
            computed.append(steps)
    return copied, computed


def _unchanged(steps: list[Step], checkpoint: Checkpoint, specs: dict[str, TensorSpec]) -> LazyTensor | None:
    """The source of a step that changes nothing."""
    origin = steps[0].origin
    if origin.ops.ops or len(origin.sources) != 1:
        return None
    source = checkpoint.tensors[origin.sources[0]]
    return source if source.spec.dtype == specs[steps[0].target.name].dtype else None


def _contents(
    groups: list[list[Step]], checkpoint: Checkpoint, specs: dict[str, TensorSpec]
) -> Iterator[tuple[Step, memoryview]]:
    """Every step's bytes, origin by origin, read one origin ahead."""

    def compute(steps: list[Step]) -> list[memoryview]:
        return _compute(steps, checkpoint, specs)

    with ThreadPoolExecutor(1) as reader:
        ahead = reader.submit(compute, groups[0]) if groups else None
        for index, steps in enumerate(groups):
            assert ahead
            results = ahead.result()
            ahead = reader.submit(compute, groups[index + 1]) if index + 1 < len(groups) else None
            yield from zip(steps, results, strict=True)


def _compute(steps: list[Step], checkpoint: Checkpoint, specs: dict[str, TensorSpec]) -> list[memoryview]:
    """The bytes of the steps that share one origin, in their order."""
    import torch

    origin, wanted = steps[0].origin, [specs[step.target.name] for step in steps]
    if source := _unchanged(steps, checkpoint, specs):
        return [source.read()]
    sources = [checkpoint.tensors[name] for name in origin.sources]
    tensors = [to_torch(source.read(), source.spec) for source in sources]
    try:
        if origin.fill is None:
            results = origin.ops.run(tensors, origin.parts)
        else:
            results = [constant(origin.fill, steps[0].target.shape, getattr(torch, steps[0].target.dtype))]
    except (OpError, ValueError) as error:
        raise OutputError(str(error), tensor=wanted[0].name) from error
    return [from_torch(_cast(results[step.part], spec)) for step, spec in zip(steps, wanted, strict=True)]


def _cast(tensor: Any, spec: TensorSpec) -> Any:
    """Round to nearest even, once; a finite value that becomes infinite is refused."""
    import torch

    dtype = getattr(torch, spec.dtype)
    if tensor.dtype == dtype:
        return tensor
    narrow = tensor.dtype == torch.float64 and dtype.itemsize == 2
    cast = (_to_odd(tensor) if narrow else tensor).to(dtype)
    if overflow := int((torch.isfinite(tensor) & ~torch.isfinite(cast)).sum()):
        raise OutputError(
            f"{overflow} values do not fit {spec.dtype}", tensor=spec.name, cure="try --dtype bfloat16 or float32"
        )
    return cast


def _to_odd(tensor: Any) -> Any:
    """float64 as float32, rounded to odd: torch goes this way to 16 bits, and would round to even twice."""
    import torch

    single = tensor.to(torch.float32)
    back = single.to(torch.float64)
    bits = single.view(torch.int32) - (back.abs() > tensor.abs()).to(torch.int32)
    return (bits | (back != tensor).to(torch.int32)).view(torch.float32)


def _emitted(spec: TensorSpec, dtype: str) -> TensorSpec:
    keep = dtype == "source" or not spec.dtype.startswith(("float", "bfloat"))
    return spec if keep else TensorSpec(spec.name, spec.shape, dtype)


def _layout(specs: dict[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The header that the safetensors library would write, and each tensor's offset behind it.

    The library sorts by alignment, widest first, then by name, and pads the header to eight bytes with spaces.
    """
    rank = {dtype: index for index, dtype in enumerate(_LIBRARY_ORDER)}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places, offset = {}, 0
    for spec in sorted(specs.values(), key=lambda s: (rank[s.dtype], s.name.encode())):
        end = offset + spec.nbytes
        entries[spec.name] = {
            "dtype": DTYPES[spec.dtype][0],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        places[spec.name], offset = offset, end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, places


_LIBRARY_ORDER = (  # widest first; within a width as the library's own enumeration has them, last first
    "uint64", "int64", "float64", "complex64", "float32", "uint32", "int32", "bfloat16", "float16", "uint16",
    "int16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8", "bool",
)  # fmt: skip


def _reserve(file: int, nbytes: int) -> None:
    """Claim the space at once, where the file system can: a full disk is found out here, and writing is faster."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, nbytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise


def _write(file: int, raw: memoryview, offset: int) -> None:
    while len(raw):
        count = os.pwrite(file, raw, offset)
        raw, offset = raw[count:], offset + count


def _read_back(path: Path, specs: dict[str, TensorSpec]) -> None:
    """Open the file with the safetensors library and compare every entry."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except SafetensorError as error:
        raise OutputError(f"was not written whole: {error}", file=path) from error
    if found != {name: (DTYPES[spec.dtype][0], spec.shape) for name, spec in specs.items()}:
        raise OutputError("does not hold what was written to it", file=path)
