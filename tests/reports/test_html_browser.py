"""The page in Chromium: what is on it, at two widths and in both colour schemes, and that it reaches for nothing.

Where there is no browser these tests fail; `-m "not browser"` leaves them out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from converters.reports.dossier import read_dossier
from converters.reports.html import render_html

pytestmark = pytest.mark.browser

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions"),
)
HOSTILE = '<script>alert(1)</script>"><img src=//localhost/x onerror=alert(1)>' + "\u202e\x1b[31m" + "x" * 500


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    names = ("chromium", "chromium-browser", "google-chrome")
    binary, driver = next(filter(None, map(shutil.which, names)), None), shutil.which("chromedriver")
    assert binary and driver, "no Chromium: apt-get install chromium chromium-driver, or pytest -m 'not browser'"
    options = ChromeOptions()
    options.binary_location = binary
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = Chrome(options, Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture
def show(browser, tmp_path) -> Callable[..., Any]:
    """Opens a page's text from disk, in a window of some width."""

    def load(text: str, width: int = 1280, scheme: str = "light", media: str = "screen") -> Any:
        path = tmp_path / "a report.html"
        path.write_text(text, "utf-8")
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
        for log in ("browser", "performance"):
            browser.get_log(log)
        browser.get(path.as_uri())
        return browser

    return load


def complaints(browser: Any) -> list[str]:
    """What the console says: errors of markup and of drawing, and violations of the policy."""
    return [entry["message"] for entry in browser.get_log("browser")]


def requests(browser: Any) -> list[str]:
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]


def elements(browser: Any, selector: str) -> list[Any]:
    return browser.find_elements("css selector", selector)


def seen(browser: Any, selector: str) -> str:
    (element,) = elements(browser, selector)
    assert element.is_displayed() and element.size["height"] > 0
    return element.text


OVERFLOW = """
const wide = [], limit = document.documentElement.clientWidth;
for (const one of document.querySelectorAll("body *")) {
  if (one.closest("svg, .scroll") && !one.matches(".scroll")) continue;
  const box = one.getBoundingClientRect();
  if (box.width && (box.right > limit + 1 || box.left < -1)) wide.push(one.tagName + " " + box.right);
}
return [document.documentElement.scrollWidth - limit, wide];
"""
CONTRAST = """
const linear = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
const light = (colour) => {
  const [r, g, b] = colour.match(/[0-9.]+/g).map((v) => linear(v / 255));
  return .2126 * r + .7152 * g + .0722 * b + .05;
};
const paper = light(getComputedStyle(document.body).backgroundColor), found = {};
for (const one of document.querySelectorAll("body *")) {
  const words = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!words || one.matches("title, desc")) continue;
  const style = getComputedStyle(one), ink = light(one.closest("svg") ? style.fill : style.color);
  found[one.tagName + "." + (one.getAttribute("class") || "")] = Math.max(ink, paper) / Math.min(ink, paper);
}
return found;
"""


def test_what_is_on_the_page(show, failing):
    browser = show(render_html(read_dossier(failing)))
    verdict = seen(browser, "#verdict")
    assert verdict.startswith("Failed: not the same function: logits on digits: error 3.2e-02 where 1.0e-10 is allowed")
    assert seen(browser, "#culprit") == "blocks.2.0.conv_pw"
    assert browser.title == "Failed: mobilenet"
    assert len(elements(browser, "#mutant-table tbody tr")) == 5
    plan = json.loads((failing / "conversion.json").read_text("utf-8"))
    counts = [int(fold.text) for fold in elements(browser, ".folds .fold:not(.heads) > :first-child")]
    assert sum(counts) == len(plan["tensors"]) == 314
    assert complaints(browser) == []
    assert [url for url in requests(browser) if not url.startswith("file:")] == []


def test_the_chart_has_its_points_in_its_frame(show, failing):
    browser = show(render_html(read_dossier(failing)))
    (chart,) = elements(browser, "svg.depth")
    frame = chart.rect
    assert chart.is_displayed() and frame["height"] > 300 and chart.accessible_name.startswith("Errors of 105 modules")
    counts = {"circle.error": 105, "path.local": 104, "circle.error.bad": 85, "path.local.bad": 1}
    assert {selector: len(elements(chart, selector)) for selector in counts} == counts
    boxes = browser.execute_script(
        "return [...arguments[0].querySelectorAll('circle, path.local, text')].map(one => one.getBoundingClientRect())",
        chart,
    )
    outer = browser.execute_script("return arguments[0].getBoundingClientRect()", chart)
    assert all(outer["left"] <= box["left"] and box["right"] <= outer["right"] for box in boxes)
    assert all(outer["top"] <= box["top"] and box["bottom"] <= outer["bottom"] for box in boxes)
    first, last = elements(chart, "circle.error")[0].rect, elements(chart, "circle.error")[-1].rect
    assert last["x"] - first["x"] > 700 and first["y"] - last["y"] > 150
    assert len(elements(browser, "svg.cells rect")) == 142


def test_folds_open(show, failing):
    browser = show(render_html(read_dossier(failing)))
    fold = next(one for one in elements(browser, ".folds details") if "conv_pwl" in one.text)
    assert not elements(fold, "tbody tr")[0].is_displayed()
    elements(fold, "summary")[0].click()
    rows = elements(fold, "tbody tr")
    assert len(rows) == 16 and all(row.is_displayed() for row in rows)
    assert rows[0].text == "blocks.1.0.conv_pwl.weight block_1_project/kernel"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("hostile", [False, True], ids=["plain", "hostile"])
def test_nothing_runs_over_the_edge(show, failing, change, width, hostile):
    if hostile:
        spoil(failing, change)
    browser = show(render_html(read_dossier(failing)), width)
    browser.execute_script("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert browser.execute_script("return innerWidth") == width
    assert browser.execute_script(OVERFLOW) == [0, []]
    assert seen(browser, "#verdict")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", ["passing", "unproven", "failing"])
def test_text_stands_out_from_the_paper(show, kind, scheme, request):
    """Level AA of the accessibility guidelines."""
    browser = show(render_html(read_dossier(request.getfixturevalue(kind))), scheme=scheme)
    found = browser.execute_script(CONTRAST)
    assert len(found) > 20 and {name: ratio for name, ratio in found.items() if ratio < 4.5} == {}
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, paper[4:-1].split(","))) > 600) == (scheme == "light")


def test_names_do_nothing(show, failing, change):
    spoil(failing, change)
    browser = show(render_html(read_dossier(failing)))
    assert "<script>alert(1)</script>" in seen(browser, "#verdict") and "\\u202e\\x1b[31m" in seen(browser, "#verdict")
    assert elements(browser, "script, img, iframe, object") == []
    assert complaints(browser) == []
    assert [url for url in requests(browser) if not url.startswith("file:")] == []


def test_the_policy_would_stop_them(show, folder):
    intruder = "<script>document.title = 'owned'</script><img src='//localhost/x'><p id=p style='color: red'>p</p>"
    browser = show(render_html(read_dossier(folder)).replace("<main>", "<main>" + intruder))
    assert browser.title == "Passed: mobilenet"
    said = " ".join(complaints(browser))
    assert all(f"'{directive}'" in said or directive in said for directive in ("script-src", "img-src", "style-src"))
    assert [url for url in requests(browser) if not url.startswith("file:")] == []
    assert elements(browser, "#p")[0].value_of_css_property("color") != "rgba(255, 0, 0, 1)"


def test_a_long_page_is_quick(show, failing, change):
    tensors = {f"blocks.{k}.{leaf}": {"from": [f"b.{k}.{leaf}"], "line": k % 50} for k in range(2500) for leaf in "wb"}
    change(failing, "conversion.json", tensors=tensors)
    browser = show(render_html(read_dossier(failing)))
    timing = browser.execute_script("return performance.getEntriesByType('navigation')[0].toJSON()")
    assert timing["loadEventEnd"] < 3000 and complaints(browser) == []


def test_print(show, failing):
    """Light, whatever the screen has."""
    browser = show(render_html(read_dossier(failing)), width=720, scheme="dark", media="print")
    assert elements(browser, "body")[0].value_of_css_property("background-color").startswith("rgba(253")
    assert not elements(browser, "nav")[0].is_displayed()
    assert browser.execute_script(OVERFLOW) == [0, []]


def spoil(folder: Path, change: Callable[..., None]) -> None:
    """Hostile names wherever a checkpoint or a framework can put one."""
    found = json.loads((folder / "verification.json").read_text("utf-8"))
    for one in (*found["comparisons"], *found["taps"], found["first_divergence"], *found["mutants"]["mutants"]):
        for key in ("output", "probe", "source", "target", "reason", "tensor"):
            if one.get(key):
                one[key] = HOSTILE + one[key]
    found |= {"summary": HOSTILE, "culprit": HOSTILE, "warnings": [HOSTILE], "target": {HOSTILE: HOSTILE}}
    change(folder, **found)
    tensors = {f"{HOSTILE}.{k}.w": {"from": [f"{HOSTILE}.{k}/kernel"], "ops": HOSTILE} for k in range(5)}
    texts = {"tensors": tensors, "drops": {HOSTILE: HOSTILE}, "caveats": [HOSTILE], "family": HOSTILE}
    change(folder, "conversion.json", **texts, source={"name": HOSTILE, "format": HOSTILE, "sha256": HOSTILE})
