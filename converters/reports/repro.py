"""A folder from which a verification can be repeated elsewhere, without the source framework.

    config.json, model.safetensors    what timm loads
    recording.npz                     the probes, and what the reference answered
    conversion.json, mapping.yaml     where every tensor comes from
    verification.json                 what was found
    replay.py                         the comparison, by torch, timm and numpy alone
    README.md                         what to run

No path of this machine is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np

from converters.errors import ConverterError, printable
from converters.folders import new_folder
from converters.mapping import load_mapping
from converters.reports.dossier import Dossier, read_dossier
from converters.verifier.recording import read_recording

__all__ = ["write_repro"]

_ROUNDING = """
The weights are rounded to {}, and `replay.py` runs them as they are: its errors contain that rounding, which
`timmport verify` leaves out.
"""
# a slash, perhaps behind a drive, and folders with a slash behind each
_FOLDERS = re.compile(r"(?<![\w./\\:])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:]+[/\\])+")


def write_repro(
    directory: str | os.PathLike[str],
    recording: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write `folder` from a verified directory and the recording that it was verified with. Raises ConverterError."""
    directory, dossier = Path(directory), read_dossier(directory)
    with new_folder(Path(folder), overwrite) as new:
        _link(directory / "model.safetensors", new / "model.safetensors")
        for name in ("config.json", "conversion.json", "verification.json"):
            document = json.loads((directory / name).read_text("utf-8"))
            (new / name).write_text(json.dumps(_portable(document), indent=1) + "\n", "utf-8")
        probes = _copy_recording(Path(recording), new / "recording.npz")
        mapping = _mapping(dossier)
        if mapping is not None:
            (new / "mapping.yaml").write_bytes(mapping)
        shutil.copyfile(Path(__file__).with_name("replay.py"), new / "replay.py")
        (new / "README.md").write_text(_readme(dossier, probes, mapping is not None), "utf-8")


def _link(source: Path, destination: Path) -> None:
    """The file under another name, or where the disk cannot do that a copy."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _copy_recording(path: Path, destination: Path) -> list[str]:
    """The recording, its outputs laid out as timm's and its taps as they are; returns the probes' names."""
    recording = read_recording(path)
    with ZipFile(path) as old, ZipFile(destination, "w", ZIP_DEFLATED) as new:
        with old.open("about.npy") as file:
            about = json.loads(str(np.lib.format.read_array(file, allow_pickle=False)))
        about = {key: value for key, value in about.items() if key not in ("ops", "input")}
        arrays = {"about": np.array(json.dumps(_portable(about)))}
        arrays |= {f"input.{probe}": array for probe, array in recording.inputs.items()}
        arrays |= {f"labels.{probe}": array for probe, array in recording.labels.items()}
        for precision, probes in recording.outputs.items():
            for probe, answers in probes.items():
                arrays |= {f"{precision}.{probe}.{output}": array for output, array in answers.items()}
        for name, array in arrays.items():
            with new.open(f"{name}.npy", "w", force_zip64=True) as into:
                np.lib.format.write_array(into, array, allow_pickle=False)
        for name in old.namelist():
            if name.startswith("tap."):
                with old.open(name) as tap, new.open(name, "w", force_zip64=True) as into:
                    shutil.copyfileobj(tap, into)
    return list(recording.inputs)


def _mapping(dossier: Dossier) -> bytes | None:
    """The family's file, if it is still the one that the conversion used."""
    with suppress(ConverterError, OSError):
        found = load_mapping(dossier.conversion.family).path.read_bytes()
        if hashlib.sha256(found).hexdigest() == dossier.conversion.family_sha256:
            return found
    return None


def _portable(value: Any) -> Any:
    """A document without the folders of this machine.

    >>> _portable({"config": "/home/me/swin.py", "note": "no float64: C:\\\\py\\\\python.exe has no kernel/bias"})
    {'config': 'swin.py', 'note': 'no float64: python.exe has no kernel/bias'}
    """
    if isinstance(value, dict):
        return {key: _portable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_portable(item) for item in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _readme(dossier: Dossier, probes: list[str], mapping: bool) -> str:
    conversion, found = dossier.conversion, dossier.verification
    source = shlex.quote(printable(conversion.source.name)) if conversion.source.name else "CHECKPOINT"
    versions: Mapping[str, str] = {**conversion.versions, **found.target, **found.reference.framework}
    names = [name for name in versions if not name.endswith("sha256")]
    rows = "".join(f"| {_plain(name)} | {_plain(versions[name])} |\n" for name in names)
    outputs = "\n".join(
        f"{'passed' if one.passed else 'FAILED'}  {printable(one.output)} on {printable(one.probe)}"
        + (f": {printable(one.reason)}" if one.reason else "")
        for one in found.comparisons
    )
    rounding = "" if conversion.dtype == "source" else _ROUNDING.format(_plain(conversion.dtype))
    return f"""# {_plain(conversion.target.architecture)} from {_plain(conversion.source.name)}: {found.outcome}

```
{outputs}
```

Again, with torch, timm and numpy alone:

```sh
python replay.py
```
{rounding}
Again, with timmport and the source, whose SHA-256 is `{_plain(conversion.source.sha256)}`, beside this file:

```sh
timmport verify . --source {source} --reference recording.npz
```

`recording.npz` holds the inputs ({_plain(", ".join(probes))}) and what the source framework answered;
`conversion.json` says where every tensor comes from{", by `mapping.yaml`" if mapping else ""}. The mapping is
`{_plain(conversion.family)}`, SHA-256 `{_plain(conversion.family_sha256)}`.

| | |
|---|---|
{rows}"""


def _plain(text: str) -> str:
    """Text without what Markdown or HTML would read as markup."""
    return re.sub(r"[^\w.\-+/, ]", "_", printable(text))
