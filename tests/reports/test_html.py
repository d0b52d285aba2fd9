from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest

from converters.errors import CheckpointError, OutputError
from converters.reports.dossier import read_dossier
from converters.reports.html import render_html, write_html

VOID = {"meta", "wbr"}
INLINE = {"a", "wbr", "span", "code", "strong"}  # they part no words
TAGS = {
    *("html", "head", "meta", "title", "style", "body", "header", "main", "section", "footer", "nav", "h1", "h2", "h3"),
    *("p", "a", "span", "code", "strong", "wbr", "ul", "li", "dl", "dt", "dd", "div", "details", "summary", "figure"),
    *("figcaption", "table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "desc", "circle", "line", "path", "polyline", "rect", "text"),
}
CULPRIT, UNCHECKED = 20, 1  # of the fixture
HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'onclick='alert(1)",
    "</style></svg></title></table><a href=javascript:alert(1)>",
    "{{ 7 * 7 }}{% include 'x' %}",
    "a\u202egpj.exe\u2066",
    "\x1b[31mred\x00\x07",
    "\ud800\ufffe",
    "0" * 2000,
)


class Page(HTMLParser):
    """A page's elements and text; fails where tags do not close each other."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs)
        self.words.append("" if tag in INLINE else " ")
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.words.append("" if tag in INLINE else " ")
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements if name in attrs]

    def count(self, tag: str, kind: str | None = None) -> int:
        return sum(t == tag and (kind is None or kind in (a.get("class") or "").split()) for t, a in self.elements)


def check(page: Page) -> None:
    """What holds for every page: it reaches for nothing, runs nothing, and is built soundly."""
    assert {tag for tag, _ in page.elements} <= TAGS
    assert not [name for _, attrs in page.elements for name in attrs if name.startswith("on") or name == "style"]
    assert page.attributes("src") == [] and page.attributes("xlink:href") == []
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {href.removeprefix("#") for href in page.attributes("href")} <= set(ids)
    labels = {part for name in ("aria-labelledby",) for value in page.attributes(name) for part in value.split()}
    assert labels <= set(ids)
    assert all("scope" in attrs for tag, attrs in page.elements if tag == "th")
    assert not re.search(r"url\(|@import|https?:|//", page.style)
    (policy,) = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv")]
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


@pytest.mark.parametrize("kind", ["folder", "passing", "failing"])
def test_a_page_is_sound(kind, request):
    page = Page(render_html(read_dossier(request.getfixturevalue(kind))))
    check(page)
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in pairwise(levels))


def test_a_verification_without_more_says_what_was_not_done(folder):
    page = Page(render_html(read_dossier(folder)))
    assert "Passed: the same function in float64: 1 output, worst error" in page.text
    assert "only their outputs were compared" in page.text and "No mutants were run" in page.text
    assert "were not asked what they declare" in page.text
    assert page.count("svg") == 0 and page.count("details") > 0


def test_pairs_are_listed_where_nothing_was_recorded(folder, change):
    change(folder, unchecked=[{"source": "s", "target": "t", "line": 1, "reason": "the reference recorded no taps"}])
    assert "1 pair that could not be compared" in Page(render_html(read_dossier(folder))).text


def test_a_failure_is_told_from_its_cause_on(failing):
    page = Page(render_html(read_dossier(failing)))
    assert "Failed: not the same function: logits on digits: error 3.2e-02 where 1.0e-10 is allowed" in page.text
    assert "something else on the same input: blocks.2.0.conv_pw" in page.text
    modules, legend = 105, 1
    assert page.count("circle", "error") == modules + legend and page.count("circle", "bad") == modules - CULPRIT
    assert page.count("path", "local") == modules - UNCHECKED + legend and "culprit and first divergence" in page.text
    assert page.count("rect", "s7") == 2 and "channel 1: not finite" in page.text
    for words in (
        "22: bn1, blocks.{0..6}.{0..2}.bn1",
        "timm runs no global_pool",
        "its first input in timm is no tensor",
        "All 5 were found, the weakest by 300",
        "1 draw that damaged nothing",
        "neck of the detector",
        "averaged weights; --ema takes them",
        "[0.485, 0.456, 0.406] [0.5] differs",
        "BGR \N{EN DASH} differs",
        "warning no float32: the framework says no",
    ):
        assert words in page.text, words


def test_an_unproven_verification(unproven):
    page = Page(render_html(read_dossier(unproven)))
    assert "Unproven: the same function in float64" in page.text
    assert "would have found a fault is not proven: 1 deliberate fault passed too." in page.text
    assert "1 of 5 passed." in page.text and page.count("rect", "bad") == 1


def test_weights_that_were_rounded(folder, change):
    rounding = {"passed": False, "dtype": "float16", "tensors": 9, "wrong": ["fc.weight", "fc.bias"]}
    change(folder, rounding=rounding)
    assert "2 of 9 are not the source's, rounded: fc.{weight,bias}" in Page(render_html(read_dossier(folder))).text
    change(folder, rounding={**rounding, "passed": True, "wrong": []})
    assert "each rounded once, to the nearest" in Page(render_html(read_dossier(folder))).text


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_stay_text(failing, name):
    """In every field of every document."""
    for document in ("verification.json", "conversion.json", "config.json"):
        path = failing / document
        path.write_text(json.dumps(infected(json.loads(path.read_text("utf-8")), name)), "utf-8")
    text = render_html(read_dossier(failing))
    check(Page(text))
    assert len(text) < 3_000_000
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    text.encode("utf-8")


def test_a_name_of_a_megabyte(failing, change):
    name = "<0." * 350_000
    change(failing, "conversion.json", tensors={name + "w": {"from": [name], "ops": name}}, drops={name: name})
    change(failing, culprit=name, warnings=[name])
    start = time.process_time()
    text = render_html(read_dossier(failing))
    check(Page(text))
    assert time.process_time() - start < 10 and len(text) < 300_000


def infected(value, name, key=""):
    """The document with `name` in front of every text, but those that are words of the format."""
    if isinstance(value, dict):
        fixed = key in ("", "source", "target", "reference", "mutants", "pretrained_cfg", "first_divergence")
        inner = {k if fixed else name + k: infected(v, name, k) for k, v in value.items()}
        return {k: v if fixed or key != "tensors" else infected(value[k[len(name) :]], name) for k, v in inner.items()}
    if isinstance(value, list):
        return [infected(item, name) for item in value]
    return name + value if isinstance(value, str) and key not in ("outcome", "summary") else value


@pytest.mark.parametrize(
    ("error", "shown"),
    [("NaN", "NaN"), ("Infinity", "infinite"), ("null", "not finite"), ("1e999", "infinite"), ("0", "0")],
)
def test_errors_that_are_no_numbers(failing, error, shown):
    path = failing / "verification.json"
    text = re.sub(r'"(error|margin|local_error)": [0-9.e+-]+', rf'"\1": {error}', path.read_text("utf-8"))
    path.write_text(re.sub(r'"sample_errors": \[[0-9.e-]+', f'"sample_errors": [{error}', text), "utf-8")
    page = Page(render_html(read_dossier(failing)))
    check(page)
    assert page.text.count(f" {shown}") > 100
    places = [attrs[key] for _, attrs in page.elements for key in ("x", "y", "cx", "cy", "x1", "y1") if key in attrs]
    assert all(0 <= float(place) < 2000 for place in places)


def test_a_long_conversion_is_quick_and_small(failing, change):
    tensors = {
        f"layers.{k // 20}.blocks.{k % 20}.mlp.fc{part}.{leaf}": {
            "from": [f"backbone.stages.{k // 20}.blocks.{k % 20}.ffn.layers.{part}.0.{leaf}"],
            "ops": "",
            "line": part,
        }
        for k in range(300)
        for part in (1, 2)
        for leaf in ("weight", "bias")
    }
    assert len(tensors) == 1200
    change(failing, "conversion.json", tensors=tensors)
    dossier = read_dossier(failing)
    start = time.process_time()
    text = render_html(dossier)
    assert time.process_time() - start < 1 and len(text.encode()) < 1_500_000
    page = Page(text)
    assert "layers.{0..14}.blocks.{0..19}.mlp.fc1." in page.text and page.text.count("layers.14.blocks.19.mlp") == 4


@pytest.mark.parametrize(
    ("document", "content", "words"),
    [
        ("verification.json", None, "verification.json: cannot be read: no such file or directory; verify the folder"),
        ("verification.json", "{", "verification.json: is not JSON"),
        ("verification.json", "[" * 100_000, "verification.json: is not JSON"),
        ("verification.json", "[]", "verification.json: is not as timmport writes it"),
        ("verification.json", '{"outcome": 7}', "is not as timmport writes it: outcome: "),
        ("conversion.json", '{"tensors": {"\\u001b[0m": {"from": 1}}}', "tensors.\\x1b[0m.from: "),
        ("conversion.json", b"\xff", "conversion.json: is not JSON"),
    ],
)  # fmt: skip
def test_documents_that_are_none(folder, document, content, words):
    path: Path = folder / document
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError) as caught:
        write_html(folder, folder / "report.html")
    assert words in str(caught.value) and str(caught.value).isprintable()
    assert not (folder / "report.html").exists()


def test_a_page_that_cannot_be_written(folder):
    with pytest.raises(OutputError, match="cannot be written: is a directory"):
        write_html(folder, folder)
