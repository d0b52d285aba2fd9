"""The model card, README.md of an emitted folder: what the Hub shows of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["note_verification", "write_card"]

_VERIFIED = "| verified | "


def write_card(folder: Path, record: Mapping[str, Any]) -> None:
    """README.md from what conversion.json holds."""
    source, target = record["source"], record["target"]
    args = ", ".join(f"{key}={value!r}" for key, value in target["args"].items()) or "timm's defaults"
    sources = sum("from" in tensor for tensor in record["tensors"].values())
    changes = [f"Changed on request: {change['text']}." for change in record["changes"]]
    caveats = "".join(f"\n> {caveat}\n" for caveat in (*changes, *record["caveats"]))
    license = f"license: {_plain(record['license'])}\n" if record.get("license") else ""
    text = f"""---
library_name: timm
{license}tags:
- image-{"classification" if target["args"].get("num_classes") != 0 else "feature-extraction"}
- timm
---
# {_plain(target["architecture"])} from {_plain(source["name"])}

Converted by timmport {record["versions"]["timmport"]} from a {source["format"]} checkpoint of the family
`{record["family"]}`. Every tensor's origin is in `conversion.json`.
{caveats}
| | |
|---|---|
| architecture | `{target["architecture"]}` ({args}) |
| source | `{_plain(source["name"])}`, SHA-256 `{source["sha256"]}` |
| tensors | {len(record["tensors"])}, {sources} of them from sources; {len(record["drops"])} sources dropped |
| license | {_plain(record.get("license") or "that of the source; not stated")} |
{_VERIFIED}not yet |

```python
import timm
model = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True)
```
"""
    (folder / "README.md").write_text(text, "utf-8")


def note_verification(folder: Path, result: str) -> None:
    """Put the result of a verification in the card; without a card of ours nothing is done."""
    path = folder / "README.md"
    if path.is_file():
        lines = path.read_text("utf-8").splitlines()
        result = result.replace("|", "/").replace("\n", " ")
        noted = [f"{_VERIFIED}{result} |" if line.startswith(_VERIFIED) else line for line in lines]
        path.write_text("\n".join(noted) + "\n", "utf-8")


def _plain(text: str) -> str:
    """Text without what Markdown or HTML would read as markup."""
    return re.sub(r"[^\w.,;\- ]", "_", text)
