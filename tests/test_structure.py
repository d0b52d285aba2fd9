"""What the code promises about itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import converters
from converters.mapping import find_mappings, load_mapping

PACKAGE = Path(__file__).parents[1] / "converters"
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FLOORS = (  # a module imports from lower floors only; a package counts as one
    ("calculations", "errors", "rearrangements", "tensors"),
    ("card", "folders", "folding", "names", "numbering", "ops", "soundness", "strict_yaml", "values"),
    ("normalizers",),
    ("rows", "schema", "signature", "target", "readers"),
    ("mapping",),
    ("routes",),
    ("plan",),
    ("changes", "deployment", "dropped", "features", "diagnosis", "lint", "preprocessing", "verifier"),
    ("detection", "emitter"),
    ("description",),
    ("closing", "conversion", "differences"),
    ("checking", "demo"),
    ("reports",),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {name: height for height, names in enumerate(FLOORS) for name in names}


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def imports(module: str) -> Iterator[str]:
    """The modules of this package that a module imports, at its top or inside a function."""
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "converters":
            home = node.module.removeprefix("converters").removeprefix(".")
            for alias in node.names:
                full = f"{home}.{alias.name}".removeprefix(".")
                yield full if full in MODULES else home
        elif isinstance(node, ast.Import):
            yield from (alias.name[11:] for alias in node.names if alias.name.startswith("converters."))


def test_every_module_has_its_floor():
    assert {module.split(".")[0] for module in MODULES} == set(FLOOR)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    here = module.split(".")[0]
    for other in imports(module):
        there = other.split(".")[0]
        assert there == here or FLOOR[there] < FLOOR[here], f"{module} imports {other}"


def test_imports_have_no_circle():
    order = TopologicalSorter({module: set(imports(module)) - {module} for module in MODULES})
    assert set(order.static_order()) >= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_all_names_what_is_public(module):
    tree = parsed(module)
    declared = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    if not declared:
        assert not any(isinstance(node, (ast.ClassDef, ast.FunctionDef)) for node in tree.body)
        return
    names = ast.literal_eval(declared[0].value)
    definitions = [node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    commands = {node.name for node in definitions if any("app." in ast.unparse(one) for one in node.decorator_list)}
    public = {node.name for node in definitions if not node.name.startswith("_")} - commands
    known = {node.name for node in definitions}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            known.add(node.id)
        elif isinstance(node, ast.alias):
            known.add(node.asname or node.name)
    assert public <= set(names), "public, but not in __all__"
    assert set(names) <= known, "in __all__, but not there"
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_read_in_one_sitting(module):
    text = MODULES[module].read_text("utf-8")
    assert len(text.splitlines()) <= 350
    assert ast.get_docstring(ast.parse(text))


def test_public_names_are_there():
    assert all(getattr(converters, name).__name__ == name for name in converters.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        converters.nothing  # noqa: B018


MODEL_NAMES = (
    "swin",
    "resne",
    "efficientnet",
    "convnext",
    "mobilenet",
    "regnet",
    "densenet",
    "vit_",
    "deit",
    "inception",
)


def code(text: str) -> str:
    """Python without its docstrings and comments."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return ast.unparse(tree)


@pytest.mark.parametrize("module", MODULES)
def test_no_model_has_a_name_in_the_code(module):
    text = code(MODULES[module].read_text("utf-8")).lower()
    assert not [name for name in MODEL_NAMES if name in text]


def test_a_model_name_would_be_found():
    assert "swin" in code('"""Swin."""\nif name.startswith("swin"):  # resnet\n    pass')
    assert "resnet" not in code('def f():\n    """resnet"""  # resnet')


HEAVY = ("torch", "timm", "tensorflow", "h5py", "numpy", "safetensors", "einops", "keras", "mmengine")


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after this."""
    check = f"\nimport sys\nprint('\\n' + ' '.join(name for name in {HEAVY} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


HELP = """
import sys
from converters.cli import main
sys.argv = ["timmport", {}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "code",
    ["import converters", "import converters.cli", HELP.format('"--help"'), HELP.format('"convert", "--help"')],
    ids=["the package", "the command line", "--help", "convert --help"],
)
def test_nothing_heavy_is_loaded(code):
    assert loaded(code) == set()


@pytest.mark.parametrize(
    ("code", "names"),
    [("import numpy", {"numpy"}), ("import converters; converters.load_mapping('timm/native')", {"einops"})],
)
def test_something_heavy_would_be_noticed(code, names):
    assert names <= loaded(code)


@pytest.mark.parametrize("name", find_mappings())
def test_every_target_is_a_timm_model(name):
    import timm

    assert not [target for target in load_mapping(name).targets if not timm.is_model(target)]
