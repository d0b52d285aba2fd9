from __future__ import annotations

import json
import subprocess
import sys

import pytest

from converters.errors import MappingError
from converters.strict_yaml import load


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: [1, -2, 0.5, 1e-5, 2E+3]", [1, -2, 0.5, 1e-5, 2000.0]),
        ("a: [true, false, null, ~]", [True, False, None, None]),
        ("a: ['no', 'true', '1e3', '1:30', \"17\"]", ["no", "true", "1e3", "1:30", "17"]),
        ("a:\n  b.{i}: c\n  17: d\n  1e3: e\n", {"b.{i}": "c", "17": "d", "1e3": "e"}),
        ("a: &anchor b", "b"),
        ("a: blocks.{s}.{b}  # comment", "blocks.{s}.{b}"),
        ("a: v1.0.1", "v1.0.1"),
        ("a: |\n  no\n", "no\n"),
    ],
)
def test_plain_data(text, value):
    assert load(text, "f.yaml")[0] == {"a": value}


AMBIGUOUS = "no off Yes on True 1:30 1:30.5 017 0x1f 1_000 .5 .nan .inf 1e999 2020-01-01 00 ="


@pytest.mark.parametrize("text", AMBIGUOUS.split())
def test_values_with_two_readings(text):
    with pytest.raises(MappingError) as caught:
        load(f"a:\n  - b\n  - {text}\n", "f.yaml")
    cure = "quote text; write numbers as 17, 0.5 or 1e-5, and truth as true or false"
    assert str(caught.value) == f"f.yaml:3: `{text}` has two readings in YAML; {cure}"
    assert load(f"a: '{text}'", "f.yaml")[0] == {"a": text}


@pytest.mark.parametrize("text", ["no", "off", "Yes", "true", "null", "~", "1:30"])
def test_keys_that_are_no_names(text):
    with pytest.raises(MappingError) as caught:
        load(f"a:\n  {text}: b\n", "f.yaml")
    assert str(caught.value) == f"f.yaml:2: YAML does not read `{text}` as a name; quote it"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("a: b\nc: d\na: e", "f.yaml:3: `a` stands here twice"),
        ("a: {b: 1,\n b: 2}", "f.yaml:2: `b` stands here twice"),
        ("a: 1\n? [b]\n: c", "f.yaml:2: a key is one word; quote a pattern that begins with `{`"),
        ("a: 1\n{*}: b", "f.yaml:2: is no YAML: "),
        ("a: 1\n{q}.b: c", "f.yaml:2: is no YAML: "),
        ("a: &x 1\nb: *x", "f.yaml:2: YAML aliases are not part of the mapping language"),
        ("a:\n  b: !!str 5", "f.yaml:2: YAML tags (tag:yaml.org,2002:str) are not part of the mapping language"),
        (
            "a: !!python/object/apply:os.system [x]",
            "f.yaml:1: YAML tags (tag:yaml.org,2002:python/object/apply:os.system)",
        ),
        ("a: !!python/name:os.system ''", "f.yaml:1: YAML tags (tag:yaml.org,2002:python/name:os.system)"),
        ("a:\n  !mine {b: c}", "f.yaml:2: YAML tags (!mine) are not"),
        ("a: 'b", "f.yaml:1: is no YAML: "),
        ("a: b\n\tc: d", "f.yaml:2: is no YAML: "),
        ("a: b\n---\nc: d", "f.yaml:2: is no YAML: but found another document"),
        ("a: \x00", "f.yaml: is no YAML: "),
        ("", "f.yaml: is empty"),
        ("# only a comment", "f.yaml: is empty"),
        ('"\\e[31mred": no\n"\\e[31mred": 1', "f.yaml:1: `no` has two readings"),
        ('"\\e[31mred": 1\n"\\e[31mred": 1', "f.yaml:2: `\\x1b[31mred` stands here twice"),
    ],
)
def test_faults(text, fault):
    with pytest.raises(MappingError) as caught:
        load(text, "f.yaml")
    assert str(caught.value).startswith(fault)
    assert "\n" not in str(caught.value)


def test_lines():
    lines = load("a:\n  b:\n    - c\n    - d\n\ne: {f: 1,\n  g: 2}\n", "f.yaml")[1]
    assert [lines.of("a"), lines.of("a", "b", 1), lines.of("e", "g"), lines.of("e", "x", "y"), lines.of("x")] == [
        1,
        4,
        7,
        6,
        1,
    ]
    assert str(lines.error("is odd", "e", "g")) == "f.yaml:7: is odd"


BOMBS = {
    "aliases": "a: &a [x, x]\n"
    + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)),
    "flow": "[" * 300_000,
    "closed": "a: " + "[" * 900 + "]" * 900,
    "block": "\n".join(" " * depth + "a:" for depth in range(2000)),
    "keys": "? " * 2000 + "a",
}


def test_bombs_are_refused_and_do_not_end_the_process():
    code = """
import json, sys
from converters.errors import MappingError
from converters.strict_yaml import load
for name, text in json.load(sys.stdin).items():
    try:
        load(text, "f.yaml")
    except MappingError as error:
        print(name, error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(BOMBS), capture_output=True, text=True, timeout=20, check=True
    )
    deep = "nests deeper than 20 levels"
    assert done.stdout.splitlines() == [
        "aliases f.yaml:2: YAML aliases are not part of the mapping language",
        f"flow f.yaml:1: {deep}",
        f"closed f.yaml:1: {deep}",
        f"block f.yaml:21: {deep}",
        f"keys f.yaml:1: {deep}",
    ]
