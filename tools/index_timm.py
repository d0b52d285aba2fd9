"""Write mappings/timm/index.json: which timm models have which tensor names.

A checkpoint of timm's own does not always say which model it is; this index proposes the models that have
its names (a digest of them, without heads), and planning decides. Run it after an update of timm (about
three minutes).
"""

from __future__ import annotations

import json
import sys

import timm
import torch

from converters.detection import name_digest
from converters.mapping import mappings_folder


def main() -> None:
    index: dict[str, list[str]] = {}
    names = timm.list_models()
    for count, name in enumerate(names, 1):
        with torch.device("meta"):
            model = timm.create_model(name)
        index.setdefault(name_digest(model.state_dict()), []).append(name)
        print(f"\r{count}/{len(names)}", end="", file=sys.stderr)
    path = mappings_folder() / "timm" / "index.json"
    path.write_text(json.dumps(dict(sorted(index.items())), separators=(",", ":")).replace("],", "],\n") + "\n")
    print(f"\n{path}: {len(names)} models, {len(index)} sets of names", file=sys.stderr)


if __name__ == "__main__":
    main()
