from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import timm
import torch

from converters import cli
from converters.mapping import find_mappings


class Ended(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch, capsys, tmp_path) -> Callable[..., Ended]:
    """Run `timmport` with these arguments in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*args: str | Path) -> Ended:
        monkeypatch.setattr(sys, "argv", ["timmport", *map(str, args)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        return Ended(int(code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A checkpoint of one of timm's own test models, as its training script leaves it."""
    path = tmp_path_factory.mktemp("small") / "small.pth"
    torch.manual_seed(0)
    torch.save(
        {"arch": "test_vit", "epoch": 3, "state_dict": timm.create_model("test_vit", num_classes=7).state_dict()}, path
    )
    return path


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["convrt"], "No such command 'convrt'"),
        (["inspect"], "Missing argument 'CKPT'"),
        (["convert"], "Missing argument 'CKPT'"),
        (["convert", "a.pth"], "say where to with -o DIR, or use --dry-run"),
        (["convert", "a.pth", "-o", "out", "--dtype", "int8"], "int8"),
        (["convert", "a.pth", "-o", "out", "--arg", "depth"], "--arg depth has no value; write K=V"),
        (["convert", "a.pth", "-o", "out", "--img-size", "big"], "--img-size big is no size; write 224 or 224x320"),
        (["convert", "a.pth", "-o", "out", "--colour", "red"], "No such option: --colour"),
        (["families", "a", "b"], "unexpected extra argument"),
        (["verify", "out"], "Missing option '--source'"),
    ],
)
def test_wrong_usage_ends_with_2(run, args, problem):
    ended = run(*args)
    assert (ended.code, ended.out) == (2, "")
    assert problem in ended.err.replace("\n", " ")
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        (["inspect", "absent.pth"], "absent.pth: does not exist"),
        (["inspect", "pointer.pth"], "pointer.pth: is a git-LFS pointer, not the weights; run `git lfs pull`"),
        (["convert", "empty.pth", "-o", "out"], "empty.pth: is empty"),
        (
            ["convert", "SMALL", "-o", "out", "--to", "test_vot"],
            f"timm {timm.__version__} has no model `test_vot`; did you mean test_vit",
        ),
        (["convert", "SMALL", "-o", "out", "--family", "swin"], "there is no family `swin`; did you mean mmlab/swin"),
        (["convert", "SMALL", "-o", "out", "--family", "bad.yaml"], "bad.yaml:2: `a` stands here twice"),
        (
            ["convert", "SMALL", "-o", "out", "--arg", "colour=red"],
            "timm's test_vit does not take colour='red', num_classes=7",
        ),
        (["convert", "SMALL", "-o", "out", "--arg", "checkpoint_path=a.pth"], "`checkpoint_path` is no argument of an"),
        (["convert", "SMALL", "-o", "out", "--expect-sha256", "00"], "small.pth: has the SHA-256 "),
        (["convert", "SMALL", "-o", "full"], "full: is there already; choose another name, or pass --overwrite"),
        (["convert", "SMALL", "-o", "full", "--overwrite"], "full: holds other files too (thesis.tex)"),
        (["families", "nothing"], "there is no family `nothing`; there are "),
        (["verify", "full", "--source", "SMALL"], "full"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True], ids=["", "json"])
def test_a_refusal_is_one_line_and_ends_with_1(run, small, tmp_path, args, problem, as_json):
    (tmp_path / "pointer.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "empty.pth").touch()
    (tmp_path / "bad.yaml").write_text("a: b\na: c\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    ended = run(*(small if arg == "SMALL" else arg for arg in args), *["--json"] * as_json)
    assert (ended.code, ended.out) == (1, "")
    line, end, more = ended.err.partition("\n")
    assert line.startswith("timmport: ") and problem in line
    assert (end, more) == ("\n", "")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plan_error_is_told_whole(run, small):
    ended = run("convert", small, "-o", "out", "--to", "test_resnet")
    assert (ended.code, ended.out) == (1, "")
    assert ended.err.startswith(f"timmport: {small}: mappings/timm/native.yaml does not close on test_resnet (")
    assert "have no origin:" in ended.err


def test_convert_and_what_it_prints(run, small, tmp_path):
    ended = run("convert", small, "-o", "out")
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"converted {small} to out\n")
    assert "load with  timm.create_model('local-dir:out', pretrained=True)" in ended.out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "conversion.json",
        "model.safetensors",
    ]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    expected = torch.load(small, weights_only=True)["state_dict"]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("args", "key", "value"),
    [
        (["inspect", "SMALL"], "target", {"architecture": "test_vit", "args": {"num_classes": 7}}),
        (["inspect", "digits"], "reason", None),
        (["convert", "SMALL", "--dry-run"], "directory", None),
        (["convert", "SMALL", "-o", "out"], "directory", "out"),
        (["families", "mmlab/swin"], "family", "mmlab/swin"),
        (["families", "--schema"], "title", "MappingFile"),
    ],
)
def test_json_is_one_document(run, small, tmp_path, args, key, value):
    torch.save({"fc.weight": torch.ones(10, 4)}, tmp_path / "digits")
    ended = run(*(small if arg == "SMALL" else arg for arg in args), "--json")
    assert (ended.code, ended.err) == (0, "")
    document = json.loads(ended.out)
    assert document[key] == value or (key == "reason" and document[key].startswith("digits: is of no family"))


def test_families_as_json(run):
    documents = json.loads(run("families", "--json").out)
    assert [document["family"] for document in documents] == list(find_mappings())


def test_a_dry_run_writes_nothing(run, small, tmp_path):
    ended = run("convert", small, "--dry-run", "-o", "out")
    assert ended.code == 0
    assert "blocks.{0..5}.norm{1..2}.{weight,bias}" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_130(run, monkeypatch):
    def interrupted(*_args: object, **_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("converters.conversion.inspect", interrupted)
    assert run("inspect", "a.pth").code == 130


def test_a_bug_keeps_its_traceback(run, monkeypatch):
    def broken(*_args: object, **_options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("converters.conversion.inspect", broken)
    with pytest.raises(ZeroDivisionError):
        run("inspect", "a.pth")


def test_a_file_name_that_is_no_text(run, small, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff.pth"
    os.link(small, path)
    for more in ([], ["--json"]):
        ended = run("inspect", os.fsdecode(path), *more)
        assert (ended.code, ended.err) == (0, "")


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    """`timmport families | head -1`"""
    code = "import sys; sys.argv = ['timmport', 'families', '--schema']; from converters.cli import main; main()"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_python_m_converters_is_timmport():
    done = subprocess.run([sys.executable, "-m", "converters", "--help"], capture_output=True, text=True, check=True)
    assert "inspect" in done.stdout
