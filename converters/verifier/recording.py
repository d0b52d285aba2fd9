"""Recordings: what a reference answered to the probes, in one npz file without pickles.

    about                   JSON text: {"recording": 1, "source": {"file", "sha256"}, "runner", "model",
                            "framework": {name: version}, "notes": [line], "ops": {OUTPUT: ops}, "input": ops}
    input.PROBE             float32 NCHW
    float64.PROBE.OUTPUT    what the reference computed, in either precision or in both
    float32.PROBE.OUTPUT
    labels.PROBE            the true class of each sample, where there is one
    tap.NUMBER              float64: what entered or left modules, as `about` tells under "taps" and "modules" (see
                            references/tap_records.py); these are read one by one, when they are asked for

Only `recording` and `source` of the text must be there. OUTPUT is timm's name (see target.py); `ops` lay an
output out as timm's, and `input` makes timm's input of the reference's (`flip 1`). The reference worker writes
this form and so may anyone, where a framework runs only on some other machine. A probe's name has no dot.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from converters.errors import ReferenceFailed, printable
from converters.ops import OpError, Pipeline

__all__ = ["PRECISIONS", "Activations", "Recording", "Taps", "read_recording"]

PRECISIONS = ("float64", "float32")
LIMIT = 4 << 30  # bytes of all arrays together
LONGEST = 4 << 20  # letters of `about`
_TAP = re.compile(r"tap\.[0-9]{1,6}\.npy")

Activations = dict[str, dict[str, dict[str, np.ndarray]]]  # precision -> probe -> output -> array


@dataclass(frozen=True)
class Taps:
    """What entered and left the reference's modules, float64 and laid out as the reference has it."""

    path: Path
    archive: zipfile.ZipFile  # its file may be gone from its folder
    probe: str
    inputs: dict[str, int]
    outputs: dict[str, int]  # in the order in which the modules ended
    left_out: frozenset[str] = frozenset()  # modules, for want of room

    def read(self, number: int) -> np.ndarray:
        """Raises ReferenceFailed."""
        name = f"tap.{number}"
        with _told(self.path):
            array = _member(self.archive, self.archive.getinfo(f"{name}.npy"), self.path)
        if array.dtype != np.float64:
            raise ReferenceFailed(f"is {printable(str(array.dtype))}, not float64", file=self.path, tensor=name)
        return array


@dataclass(frozen=True)
class Recording:
    """Probes and a reference's answers to them, both as timm lays them out."""

    about: dict[str, Any]
    inputs: dict[str, np.ndarray]
    outputs: Activations
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    taps: Taps | None = None
    modules: dict[str, dict[str, Any]] = field(default_factory=dict)  # what each of the reference's declares

    @property
    def output_names(self) -> list[str]:
        answers = [answer for probes in self.outputs.values() for answer in probes.values()]
        return list(dict.fromkeys(name for answer in answers for name in answer))


def read_recording(path: str | os.PathLike[str]) -> Recording:
    """The recording at `path`, every array checked. Raises ReferenceFailed."""
    path = Path(path)
    if not path.is_file():
        raise ReferenceFailed("is not a file", file=path)
    with _told(path):
        archive = zipfile.ZipFile(path)
        arrays = _arrays(archive, path)
    about = _about(arrays.pop("about", None), path)
    taps, modules = _taps(about.pop("taps", None), archive, path), _modules(about.pop("modules", {}), path)
    recording = Recording(about, {}, {}, {}, taps, modules)
    for name, array in arrays.items():
        kind, _, rest = name.partition(".")
        probe, _, output = rest.partition(".")
        if kind in PRECISIONS and output and array.dtype == kind:
            recording.outputs.setdefault(kind, {}).setdefault(probe, {})[output] = array
        elif kind == "input" and probe and not output and array.dtype == np.float32 and array.ndim == 4:
            recording.inputs[probe] = array
        elif kind == "labels" and probe and not output and array.dtype.kind in "iu" and array.ndim == 1:
            recording.labels[probe] = array
        else:
            found = f"{array.dtype}, {array.ndim} axes"
            raise ReferenceFailed(f"has no place in a recording ({found})", file=path, tensor=name)
    _check(recording, path)
    return _as_timm(recording, path)


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Whatever goes wrong with an archive, as one line."""
    try:
        yield
    except ReferenceFailed:
        raise
    except Exception as error:  # zipfile, zlib and numpy's header parser raise many kinds
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise ReferenceFailed(f"is not a recording: {reason}", file=path) from error


def _arrays(archive: zipfile.ZipFile, path: Path) -> dict[str, np.ndarray]:
    """The arrays of an npz file but the taps, none read before its size is known to fit."""
    found: dict[str, np.ndarray] = {}
    members = [member for member in archive.infolist() if not _TAP.fullmatch(member.filename)]
    if sum(member.file_size for member in members) > LIMIT:
        raise ReferenceFailed(f"holds more than {LIMIT >> 30} GiB", file=path)
    for member in members:
        name = member.filename.removesuffix(".npy")
        if name in found:
            raise ReferenceFailed("is there twice", file=path, tensor=name)
        found[name] = _member(archive, member, path)
    return found


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> np.ndarray:
    if member.file_size > LIMIT:
        raise ReferenceFailed(f"holds more than {LIMIT >> 30} GiB", file=path)
    with archive.open(member) as file:
        return _array(file.read(member.file_size), member.filename.removesuffix(".npy"), path)


def _array(raw: bytes, name: str, path: Path) -> np.ndarray:
    """An npy file's array. numpy would allocate what a header claims; here the bytes must be there."""
    file = io.BytesIO(raw)
    version = np.lib.format.read_magic(file)
    read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read_header:
        raise ReferenceFailed(f"is an npy file of version {version[0]}.{version[1]}", file=path, tensor=name)
    shape, fortran, dtype = read_header[version](file)
    if dtype.hasobject or math.prod(shape) * dtype.itemsize != len(raw) - file.tell():
        raise ReferenceFailed(f"its header claims {printable(str(dtype))} {shape}", file=path, tensor=name)
    return np.frombuffer(raw, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")


def _about(array: np.ndarray | None, path: Path) -> dict[str, Any]:
    if array is None or array.dtype.kind != "U" or array.ndim:
        raise ReferenceFailed("is not a recording: it has no `about`", file=path)
    text = str(array)
    nesting = accumulate((letter in "[{") - (letter in "]}") for letter in text[:LONGEST])
    if len(text) > LONGEST or max(nesting, default=0) > 50:
        raise ReferenceFailed("its `about` is too long or nested too deeply", file=path)
    try:
        about = json.loads(text)
    except ValueError as error:
        raise ReferenceFailed("its `about` is not JSON", file=path) from error
    if not isinstance(about, dict) or about.get("recording") != 1:
        raise ReferenceFailed("is not a recording of version 1", file=path)
    if not isinstance(about.get("notes", []), list) or not isinstance(about.get("ops", {}), dict):
        raise ReferenceFailed("its `about` has notes that are no list or ops that are no table", file=path)
    source = about.get("source")
    if not isinstance(source, dict) or not isinstance(source.get("sha256"), str):
        raise ReferenceFailed("does not say which checkpoint it is of: its `about` has no source.sha256", file=path)
    return about


def _taps(taps: Any, archive: zipfile.ZipFile, path: Path) -> Taps | None:
    if taps is None:
        archive.close()
        return None
    try:
        inputs, outputs = ({str(n): int(number) for n, number in taps[side].items()} for side in ("inputs", "outputs"))
        left_out = frozenset(map(str, taps.get("left_out", ())))
        return Taps(path, archive, str(taps["probe"]), inputs, outputs, left_out)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ReferenceFailed("its `about` has taps that are no table of modules and numbers", file=path) from error


def _modules(modules: Any, path: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(modules, dict) or not all(isinstance(one, dict) for one in modules.values()):
        raise ReferenceFailed("its `about` has modules that are no tables", file=path)
    return modules


def _check(recording: Recording, path: Path) -> None:
    """Every probe has an answer and every answer its probe; labels are one for each sample."""
    if not recording.inputs:
        raise ReferenceFailed("holds no probe", file=path)
    for probe, labels in recording.labels.items():
        if probe not in recording.inputs or len(labels) != len(recording.inputs[probe]):
            raise ReferenceFailed("does not label one probe's samples", file=path, tensor=f"labels.{probe}")
    answered = {probe for probes in recording.outputs.values() for probe in probes}
    if recording.taps and recording.taps.probe not in recording.inputs:
        raise ReferenceFailed("taps of a probe that is not there", file=path, tensor=recording.taps.probe)
    for probe in sorted(answered ^ recording.inputs.keys()):
        problem = "a probe without an output" if probe in recording.inputs else "outputs without their probe"
        raise ReferenceFailed(problem, file=path, tensor=probe)


def _as_timm(recording: Recording, path: Path) -> Recording:
    """The recording with its ops applied."""
    ops = recording.about.get("ops", {})
    inputs = {probe: _apply(recording.about.get("input"), array, path) for probe, array in recording.inputs.items()}
    outputs = {
        precision: {
            probe: {output: _apply(ops.get(output), array, path) for output, array in answers.items()}
            for probe, answers in probes.items()
        }
        for precision, probes in recording.outputs.items()
    }
    return replace(recording, inputs=inputs, outputs=outputs)


def _apply(ops: object, array: np.ndarray, path: Path) -> np.ndarray:
    if not ops:
        return array
    import torch

    try:
        (result,) = Pipeline.parse(str(ops)).run([torch.from_numpy(array.copy())])
    except (OpError, ValueError) as error:
        raise ReferenceFailed(f"its ops do not fit: {printable(str(error))}", file=path) from error
    return result.contiguous().numpy()
