"""The worker can be copied to another machine and run by an old interpreter."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator

import pytest

from converters.verifier.worker import REFERENCES

OPENMMLAB = {"mmcv", "mmdet", "mmengine", "mmpretrain", "mmseg"}
OTHERS = {"flax", "jax", "keras", "onnxruntime", "safetensors", "tensorflow", "timm", "torch", "torchvision"}
OTHERS |= {"tf_slim", "transformers"}
FRAMEWORKS = {"numpy", "h5py", "importlib_metadata"} | OPENMMLAB | OTHERS
MODULES = sorted(REFERENCES.glob("*.py"))
LOCAL = {path.stem for path in MODULES}
LATER = {  # than Python 3.7, and not a matter of syntax
    *("removeprefix", "removesuffix", "math.prod", "math.dist", "functools.cache", "functools.cached_property"),
    *("itertools.pairwise", "importlib.metadata", "ast.unparse", "shlex.join"),
}
KEYWORDS = {("zip", "strict"), ("copytree", "dirs_exist_ok"), ("unlink", "missing_ok")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_it_imports_nothing_of_converters_and_hides_no_framework(path):
    tree = ast.parse(path.read_text())
    names = [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert {name.partition(".")[0] for name in names} <= FRAMEWORKS | LOCAL | set(sys.stdlib_module_names)
    assert path.stem not in FRAMEWORKS | set(sys.stdlib_module_names)


def too_new(text: str) -> Iterator[str]:
    """What Python 3.7 would not run. Annotations it need not: they are text."""
    tree = ast.parse(text, feature_version=(3, 7))
    if not any(isinstance(node, ast.ImportFrom) and node.module == "__future__" for node in tree.body):
        yield "no annotations from __future__"
    for node in ast.walk(tree):
        for name in ("annotation", "returns"):
            if hasattr(node, name):
                setattr(node, name, None)
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.expr) else ""
        if isinstance(node, ast.Call):
            function = ast.unparse(node.func).rpartition(".")[2]
            yield from (f"{function}({one.arg}=)" for one in node.keywords if (function, one.arg) in KEYWORDS)
        is_later = isinstance(node, ast.Attribute) and bool({node.attr, text} & LATER)
        is_generic = isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("dict", "list", "set", "tuple")
        is_union = isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and isinstance(node.left, ast.Dict)
        if is_later or is_generic or is_union:
            yield text


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_an_old_interpreter_can_run_it(path):
    assert list(too_new(path.read_text())) == []


@pytest.mark.parametrize(
    "text",
    ["'a'.removeprefix('b')", "zip([], strict=True)", "list[int]()", "{} | {}", "import math\nmath.prod([])", "1"],
)
def test_what_is_too_new_would_be_noticed(text):
    head = "" if text == "1" else "from __future__ import annotations\n"
    assert list(too_new(head + text))
    assert not list(too_new("from __future__ import annotations\nx: list[int] | None = None\n''.upper()"))


def test_there_is_something_to_check():
    assert {"__main__.py", "run_keras.py", "run_mmlab.py", "run_onnx.py"} <= {path.name for path in MODULES}
    with pytest.raises(SyntaxError):
        list(too_new("(x := 1)"))
