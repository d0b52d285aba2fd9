"""The README: its commands exist, every command is in it, and CI runs its test command to the letter."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from converters.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def lines() -> list[str]:
    found = re.findall(r"(?:^|`|/)(timmport [^`\n#]*)", README, re.MULTILINE)
    return [line.strip() for line in found]


@pytest.mark.parametrize("line", lines())
def test_a_command_of_the_readme_exists(line: str) -> None:
    _, name, *words = shlex.split(line)
    assert name in COMMANDS, line
    options = [(*parameter.opts, *parameter.secondary_opts) for parameter in COMMANDS[name].params]
    known = {"--help"}.union(*options)
    assert {word for word in words if re.match(r"--?[a-z]", word)} <= known, line


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_its_options_are_in_the_readme(name: str) -> None:
    assert f"timmport {name}" in README
    if name == "convert":
        options = [max(parameter.opts, key=len) for parameter in COMMANDS[name].params]
        missing = [option for option in options if option.startswith("--") and f"`{option}" not in README]
        assert set(missing) <= {"--out", "--overwrite", "--json"} and all(o in README for o in ("-o ", "--json"))


def test_ci_takes_its_command_from_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert "test command" in script and "README.md" in script and "pip install" not in script
    marked = re.search(r"<!-- test command -->\n```sh\n(.+?)\n```", README, re.DOTALL)
    assert marked and "pytest" in marked[1] and "-c constraints.txt" in marked[1]
