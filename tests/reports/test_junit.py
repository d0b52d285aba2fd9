from __future__ import annotations

import shutil
from xml.etree import ElementTree

import pytest

from converters.errors import OutputError
from converters.reports.dossier import read_dossier
from converters.reports.junit import render_junit, write_junit

COUNTS = ("tests", "failures", "errors")
SCHEMA = {  # what the Jenkins schema (junit-10) allows, as far as it is used: attributes that must be, and children
    "testsuites": ({"name", *COUNTS}, {"testsuite"}),
    "testsuite": ({"name", "skipped", *COUNTS}, {"testcase", "system-out"}),
    "testcase": ({"classname", "name"}, {"failure"}),
    "failure": ({"message", "type"}, set()),
    "system-out": (set(), set()),
}


def read(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text.encode())
    for element in root.iter():
        attributes, children = SCHEMA[element.tag]
        assert set(element.keys()) == attributes
        assert {child.tag for child in element} <= children
    for suite in root:
        cases = suite.findall("testcase")
        assert [int(suite.get(key)) for key in COUNTS] == [len(cases), len(suite.findall("testcase/failure")), 0]
        names = [(case.get("classname"), case.get("name")) for case in cases]
        assert len(names) == len(set(names)) and all("\n" not in name for pair in names for name in pair)
    assert root.tag == "testsuites"
    assert [int(root.get(key)) for key in COUNTS] == [sum(int(suite.get(key)) for suite in root) for key in COUNTS]
    return root


@pytest.mark.parametrize(
    ("kind", "counts", "failed"),
    [
        ("folder", {"verdict": 1, "outputs": 1}, {}),
        ("passing", {"verdict": 1, "outputs": 1, "modules": 105, "mutants": 5}, {}),
        ("unproven", {"verdict": 1, "outputs": 1, "mutants": 5}, {"verdict": 1, "mutants": 1}),
        (
            "failing",
            {"verdict": 1, "outputs": 1, "modules": 105, "mutants": 5},
            {"verdict": 1, "outputs": 1, "modules": 85},
        ),
    ],
)
def test_a_suite_fails_as_the_verification_does(kind, counts, failed, request):
    (suite,) = read(render_junit([read_dossier(request.getfixturevalue(kind))]))
    groups = {f"mobilenet.{group}" for group in counts}
    assert {case.get("classname") for case in suite.findall("testcase")} == groups
    for group, count in counts.items():
        cases = suite.findall(f"testcase[@classname='mobilenet.{group}']")
        assert len(cases) == count
        assert sum(case.find("failure") is not None for case in cases) == failed.get(group, 0)


def test_messages_say_where(failing):
    (suite,) = read(render_junit([read_dossier(failing)]))
    failures = ((case.get("name"), case.find("failure")) for case in suite)
    messages = {name: failure.get("message") for name, failure in failures if failure is not None}
    assert messages["verdict"].startswith("failed: not the same function: logits on digits")
    assert messages["logits on digits in float64"] == "error 3.2e-02 where 1.0e-10 is allowed (sample 3)"
    assert messages["blocks.2.0.conv_pw"].startswith("normal, on the reference's own input: error ")
    assert messages["blocks.2.1.bn1"].startswith("normal: error ")
    assert "no float32: the framework says no" in suite.find("system-out").text


def test_modules_alone_fail_nothing(failing, change):
    change(failing, outcome="passed")
    (suite,) = read(render_junit([read_dossier(failing)]))
    assert [case.get("classname") for case in suite if case.find("failure") is not None] == ["mobilenet.outputs"]


def test_a_verification_of_nothing_fails(folder, change):
    change(folder, outcome="failed", summary="not verified: nothing was compared", comparisons=[])
    (suite,) = read(render_junit([read_dossier(folder)]))
    assert [case.find("failure").get("message") for case in suite] == ["failed: not verified: nothing was compared"]


def test_rounded_weights(folder, change):
    change(folder, rounding={"passed": False, "dtype": "float16", "tensors": 9, "wrong": ["fc.weight", "fc.bias"]})
    (suite,) = read(render_junit([read_dossier(folder)]))
    (case,) = suite.findall("testcase[@classname='mobilenet.weights']")
    assert case.get("name") == "9 tensors rounded to float16" and "fc.weight" in case.find("failure").get("message")


@pytest.mark.parametrize("name", ["\x00\x1b[31m", "\ufffe\ud800", "]]><failure/>", '"&\n\r', "\u202e"])
def test_names_that_xml_cannot_hold(failing, change, name):
    comparison = {"output": name, "probe": name, "precision": name, "passed": False, "reason": name}
    change(failing, summary=name, warnings=[name, name], comparisons=[comparison])
    (suite,) = read(render_junit([read_dossier(failing)]))
    text = "".join(value for one in suite.iter() for value in (*one.attrib.values(), one.text or "", one.tail or ""))
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert len(suite.find("system-out").text.splitlines()) == 3


def test_several_folders(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    write_junit([folder, tmp_path / "other"], tmp_path / "junit.xml")
    root = read((tmp_path / "junit.xml").read_text("utf-8"))
    assert [suite.get("name") for suite in root] == ["mobilenet", "other"]
    with pytest.raises(OutputError, match="cannot be written: is a directory"):
        write_junit([tmp_path / "other"], tmp_path)
