"""The way to the fault, as text."""

from __future__ import annotations

from converters.reports.divergence import divergence_lines, summary_lines
from converters.verifier.verdict import Finding, Tap, Unchecked, Verdict

NAMES = ["conv1", "bn1", "layer1.0.conv1", "layer1.0", "layer1.1.conv1", "layer1.1.bn1", "layer1.1", "layer1", "fc"]


def taps(first: str | None, faulty: str | None, reason: str | None = None) -> tuple[Tap, ...]:
    start = NAMES.index(first) if first else len(NAMES)
    found = []
    for depth, name in enumerate(NAMES):
        free = (1e-15, 1e-10, True) if depth < start else (0.03, 1e-10, False)
        local = (0.02, 1e-14, False, reason) if name == faulty else (1e-16, 1e-14, True)
        found.append(Tap(f"source.{name}", name, 7, "normal", depth, *free, *local))
    return tuple(found)


def tree(*how: str | None) -> str:
    return "\n".join(divergence_lines(Verdict((), {}, {}, taps(*how))))


def test_the_way_to_a_leaf():
    assert (
        tree("layer1.1.conv1", "layer1.1.conv1")
        == """\
conv1, bn1  2 modules agree, worst 1.0e-15
layer1
  0  2 modules agree, worst 1.0e-15
  1
    conv1  differs by 3.0e-02, on the reference's own input by 2.0e-02  <- the fault
    bn1, itself  2 modules differ, by 3.0e-02 at most, and agree on the reference's own input
  itself  differs by 3.0e-02, on the reference's own input within 1.0e-16
fc  differs by 3.0e-02, on the reference's own input within 1.0e-16"""
    )


def test_a_fault_between_modules_and_drift():
    lines = tree("layer1.1.bn1", "layer1.1", "what reaches layer1.1.bn1 is already wrong").splitlines()
    assert lines[-3].endswith("by 2.0e-02 (what reaches layer1.1.bn1 is already wrong)  <- the fault")
    assert "    bn1  differs by 3.0e-02, on the reference's own input within 1.0e-16" in lines
    drift = tree("layer1.0.conv1", None)
    assert "<- the fault" not in drift and "    conv1  differs by 3.0e-02" in drift
    assert tree(None, None) == ""


def test_the_summary_names_what_was_not_checked_and_what_is_declared_otherwise():
    lost = tuple(Unchecked(f"s.{name}", name, 3, "timm runs it not") for name in ("a", "b"))
    audit = (Finding("eps", "LayerNorm", 1e-5, 1e-6, ("bn1", "norm")), Finding("stride", "Conv2d", 2, 1, ("fc",)))
    found = Verdict((), {}, {}, taps(None, None), lost, audit)
    assert list(summary_lines(found)) == [
        ("modules", "9 of 9 agree, worst 1.0e-15; 9 of 9 on the reference's own input"),
        ("unchecked", "a and 1 more: timm runs it not"),
        ("audit", "LayerNorm eps 1e-06, source 1e-05, 2 modules"),
        ("audit", "Conv2d stride 1, source 2, 1 module"),
    ]
    failed = Verdict((), {}, {}, taps("bn1", "bn1"), (), audit)
    assert [text for label, text in summary_lines(failed) if label == "audit"] == [str(audit[0])]
