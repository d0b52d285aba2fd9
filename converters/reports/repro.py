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

import numpy as np

from converters.emitter import new_folder
from converters.errors import ConverterError, OutputError, printable
from converters.mapping import load_mapping
from converters.reports.dossier import Dossier, read_dossier
from converters.verifier.recording import Recording

__all__ = ["write_repro"]

# a drive or a slash, and folders with a slash behind each
_FOLDERS = re.compile(r"(?<![\w./\\:])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\",;:]+[/\\])+")


def write_repro(
    directory: str | os.PathLike[str],
    recording: Recording,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> None:
    """Write `folder` from a verified directory and what it was verified with. Raises ConverterError."""
    dossier = read_dossier(directory)
    with new_folder(Path(folder), overwrite) as new:
        try:
            _link(Path(directory) / "model.safetensors", new / "model.safetensors")
            for name in ("config.json", "conversion.json", "verification.json"):
                document = json.loads((Path(directory) / name).read_text("utf-8"))
                (new / name).write_text(json.dumps(_portable(document), indent=2, ensure_ascii=False) + "\n", "utf-8")
            shutil.copyfile(Path(__file__).with_name("replay.py"), new / "replay.py")
        except OSError as error:
            raise OutputError(f"cannot be written: {(error.strerror or str(error)).lower()}", file=folder) from error
        with (new / "recording.npz").open("wb") as file:
            np.savez_compressed(file, **_arrays(recording))  # type: ignore[arg-type]
        mapping = _mapping(dossier)
        if mapping is not None:
            (new / "mapping.yaml").write_bytes(mapping)
        (new / "README.md").write_text(_readme(dossier, recording, mapping is not None), "utf-8")


def _link(source: Path, destination: Path) -> None:
    """The file under another name, or where the disk cannot do that a copy."""
    try:
        os.link(source, destination)
    except OSError:
        shutil.copyfile(source, destination)


def _arrays(recording: Recording) -> dict[str, np.ndarray]:
    """The recording as an npz file has it, already laid out as timm's."""
    about = {key: value for key, value in recording.about.items() if key not in ("ops", "input")}
    arrays = {"about": np.array(json.dumps(_portable(about)))}
    arrays |= {f"input.{probe}": array for probe, array in recording.inputs.items()}
    arrays |= {f"labels.{probe}": array for probe, array in recording.labels.items()}
    for precision, probes in recording.outputs.items():
        for probe, answers in probes.items():
            arrays |= {f"{precision}.{probe}.{output}": array for output, array in answers.items()}
    return arrays


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


def _readme(dossier: Dossier, recording: Recording, mapping: bool) -> str:
    conversion, found = dossier.conversion, dossier.verification
    source = shlex.quote(printable(conversion.source.name)) if conversion.source.name else "CHECKPOINT"
    versions: Mapping[str, str] = {**conversion.versions, **found.target, **found.reference.framework}
    rows = "".join(
        f"| {_plain(name)} | {_plain(version)} |\n"
        for name, version in versions.items()
        if not name.endswith("sha256")
    )
    outputs = "\n".join(
        f"{'passed' if one.passed else 'FAILED'}  {printable(one.output)} on {printable(one.probe)}"
        + (f": {printable(one.reason)}" if one.reason else "")
        for one in found.comparisons
    )
    return f"""# {_plain(conversion.target.architecture)} from {_plain(conversion.source.name)}: {dossier.outcome}

```
{outputs}
```

Again, with torch, timm and numpy alone:

```sh
python replay.py
```

Again, with timmport and the source, whose SHA-256 is `{_plain(conversion.source.sha256)}`, beside this file:

```sh
timmport verify . --source {source} --reference recording.npz
```

`recording.npz` holds the inputs ({_plain(", ".join(recording.inputs))}) and what the source framework answered;
`conversion.json` says where every tensor comes from{", by `mapping.yaml`" if mapping else ""}. The mapping is
`{_plain(conversion.family)}`, SHA-256 `{_plain(conversion.family_sha256)}`.

| | |
|---|---|
{rows}"""


def _plain(text: str) -> str:
    """Text without what Markdown or HTML would read as markup."""
    return re.sub(r"[^\w.\-+/, ]", "_", printable(text))
