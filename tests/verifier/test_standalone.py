"""The worker can be copied to another machine and run by an old interpreter."""

from __future__ import annotations

import ast
import sys

import pytest

from converters.verifier.worker import REFERENCES

FRAMEWORKS = {"numpy", "torch", "keras", "tensorflow", "mmcv", "mmengine", "importlib_metadata"}
MODULES = sorted(REFERENCES.glob("*.py"))
LOCAL = {path.stem for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_it_imports_nothing_of_converters_and_hides_no_framework(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 7))
    names = [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in names} <= FRAMEWORKS | LOCAL | set(sys.stdlib_module_names)
    assert path.stem not in FRAMEWORKS | {"mmdet", "mmpretrain", "mmseg"} | set(sys.stdlib_module_names)


def test_there_is_something_to_check():
    assert {"__main__.py", "run_keras.py", "run_mmlab.py"} <= {path.name for path in MODULES}
    with pytest.raises(SyntaxError):
        ast.parse("(x := 1)", feature_version=(3, 7))
