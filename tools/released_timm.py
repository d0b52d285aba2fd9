"""A past release of timm, from its package and in an interpreter of its own: what its models' tensors are called.

    python tools/released_timm.py VERSION ARCHITECTURE

prints the tensors as JSON. Releases from before torch 2 find what they import in place of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

__all__ = ["tensors_of"]

SCRIPT = """
import collections.abc, json, logging, sys, types, warnings

warnings.filterwarnings("ignore")
folder, architecture = sys.argv[1:]
sys.path.insert(0, folder)
for name in ("torch._six", "inplace_abn", "inplace_abn.functions"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["torch._six"].container_abcs = collections.abc
for name in ("inplace_abn", "inplace_abn_sync"):
    setattr(sys.modules["inplace_abn.functions"], name, None)
import timm

logging.disable(logging.CRITICAL)
assert timm.__file__.startswith(folder)
state = timm.create_model(architecture).state_dict()
print(json.dumps({name: [list(tensor.shape), str(tensor.dtype)] for name, tensor in state.items()}))
"""


def tensors_of(release: str, architecture: str) -> dict[str, list[Any]]:
    """Shape and dtype of every tensor, by name, as that release saves them."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, f"timm=={release}"]
        subprocess.run(pip, check=True, capture_output=True)
        words = [sys.executable, "-c", SCRIPT, folder, architecture]
        return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    print(json.dumps(tensors_of(*sys.argv[1:])))
