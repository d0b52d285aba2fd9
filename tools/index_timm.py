"""Write mappings/timm/index.json: which timm models have which tensor names.

A checkpoint of timm's own does not always say which model it is; this index proposes the models that have
its names, whole or with `features_only=True` (a digest of them, without heads), and planning decides. Run it after
an update of timm (about four minutes).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator

import timm

from converters.detection import name_digest
from converters.errors import TargetError
from converters.mapping import mappings_folder
from converters.target import build_skeleton


def main() -> None:
    index: dict[str, list[str]] = {}
    names = timm.list_models()
    for count, name in enumerate(names, 1):
        for digest in dict.fromkeys(digests(name)):
            index.setdefault(digest, []).append(name)
        print(f"\r{count}/{len(names)}", end="", file=sys.stderr)
    path = mappings_folder() / "timm" / "index.json"
    path.write_text(json.dumps(dict(sorted(index.items())), separators=(",", ":")).replace("],", "],\n") + "\n")
    print(f"\n{path}: {len(names)} models, {len(index)} sets of names", file=sys.stderr)


def digests(name: str) -> Iterator[str]:
    """Of the whole model, and of the one that gives features where there is one."""
    yield name_digest(build_skeleton(name, {}).specs)
    try:
        features = build_skeleton(name, {"features_only": True}).specs
    except TargetError:
        return
    yield name_digest(re.sub(r"^(model|body)\.", "", tensor) for tensor in features)


if __name__ == "__main__":
    main()
