from __future__ import annotations

import json

import numpy as np
import pytest

from converters.verifier.compare import FLOAT32_FLOOR, compare
from converters.verifier.verdict import Verdict

RIGHT = np.random.default_rng(0).standard_normal((2, 10))


def activations(output: str = "logits", **precisions: np.ndarray):
    return {name: {"probe": {output: array.astype(name)}} for name, array in precisions.items()}


def one(reference, target, outputs=("logits",), labels=None):
    (comparison,) = compare(reference, target, outputs, labels)
    return comparison


def both(array: np.ndarray):
    return activations(float64=array, float32=array)


def moved(error: float, sample: int = 0) -> np.ndarray:
    """RIGHT with an error of this size, relative to the sample's largest value, in one place of one sample."""
    array = RIGHT.copy()
    array[sample, 3] += error * np.abs(RIGHT[sample]).max()
    return array


@pytest.mark.parametrize(("error", "passes"), [(0, True), (0.9e-10, True), (1.1e-10, False), (1e-3, False)])
@pytest.mark.parametrize("sample", [0, 1])
def test_float64_gate(error, passes, sample):
    comparison = one(both(RIGHT), both(moved(error, sample)))
    assert comparison.precision == "float64" and comparison.passed is passes
    assert comparison.sample_errors[sample] == pytest.approx(error, rel=1e-4)
    assert comparison.sample_errors[1 - sample] == 0
    if not passes:
        assert comparison.reason.startswith(f"error {error:.1e} where 1.0e-10 is allowed (sample {sample})")


def test_a_large_sample_does_not_hide_a_small_one():
    small = RIGHT * np.array([[1], [1e-6]])
    wrong = small.copy()
    wrong[1, 0] *= 1 + 1e-3
    assert one(both(small), both(small)).passed
    assert not one(both(small), both(wrong)).passed


@pytest.mark.parametrize(
    ("reference", "target", "passes"),
    [
        (0, 0, True),
        (3.5 * FLOAT32_FLOOR, 0, True),  # the floor
        (5 * FLOAT32_FLOOR, 0, False),
        (3.5e-5, 1e-5, True),  # as far as float32 takes the target itself
        (5e-5, 1e-5, False),
        (1e-2, 1e-5, False),
    ],
)
def test_float32_gate(reference, target, passes):
    theirs = activations(float32=moved(reference))
    mine = activations(float64=RIGHT, float32=moved(target))
    comparison = one(theirs, mine)
    assert comparison.precision == "float32" and comparison.passed is passes, comparison.reason


def test_float32_beside_float64_informs():
    theirs = activations(float64=RIGHT, float32=moved(1e-2))
    comparison = one(theirs, both(RIGHT))
    assert comparison.passed and comparison.information["float32_error"] == pytest.approx(1e-2, rel=1e-3)


INFINITE = np.where(np.arange(10) == 4, np.inf, RIGHT)


@pytest.mark.parametrize(
    ("reference", "target", "words"),
    [
        ({}, both(RIGHT), None),
        (activations("other", float64=RIGHT), both(RIGHT), "the reference has no such output"),
        (both(RIGHT), activations("other", float64=RIGHT), "the target has no such output"),
        (both(RIGHT), activations(float64=RIGHT), "the target has no such output"),
        (both(RIGHT), both(RIGHT[:1]), "its shape is (2, 10) in the reference and (1, 10) in the target"),
        (both(RIGHT), both(RIGHT[..., None]), "its shape is (2, 10) in the reference and (2, 10, 1) in the target"),
        (both(RIGHT), both(INFINITE), "the target gives NaN or Inf in float64"),
        (both(INFINITE), both(INFINITE), "the reference gives NaN or Inf in float64"),
        (both(RIGHT * np.nan), both(RIGHT), "the reference gives NaN or Inf in float64"),
        (both(RIGHT[:0]), both(RIGHT[:0]), "it is empty"),
        (both(np.float64(1)), both(np.float64(1)), "it is empty"),
        (both(np.zeros((2, 3))), both(np.full((2, 3), 1e-30)), "error inf where"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_fails(reference, target, words):
    verdict = Verdict(compare(reference, target, ["logits"]), {}, {})
    assert not verdict.passed
    assert words is None or words in str(verdict)
    json.loads(verdict.to_json(), parse_constant=pytest.fail)


def test_an_output_that_hardly_depends_on_the_input_is_told():
    still = np.array([[1.0], [1.0 + 1e-4]]) * RIGHT[:1]
    assert one(both(still), both(still)).warnings == ("hardly depends on the input",)
    assert not one(both(RIGHT), both(RIGHT)).warnings


def test_float32_that_proves_little_is_told():
    theirs, mine = activations(float32=RIGHT), activations(float64=RIGHT, float32=moved(1e-3))
    comparison = one(theirs, mine)
    assert comparison.passed and "float32 rounding alone moves it by 1e-03" in comparison.warnings[0]


def test_figures_inform_and_never_decide():
    """A wrong sample of ten thousand good ones: cosine 1, all classes agree, and it fails."""
    right = np.tile(RIGHT, (50, 1))
    wrong = right.copy()
    wrong[7, 0] += 1e-6
    comparison = one(both(right), both(wrong), labels={"probe": right.argmax(1)})
    assert not comparison.passed
    assert comparison.information["cosine"] == pytest.approx(1, abs=1e-12)
    assert [comparison.information[name] for name in ("top1", "top5", "accuracy")] == [1.0, 1.0, 1.0]
    assert comparison.information["max_abs"] == pytest.approx(1e-6, rel=1e-6)


def test_verdict_in_a_line_and_in_json():
    reference = {"notes": ["no float64: on one output"], "framework": {"torch": "1"}}
    comparisons = compare(both(RIGHT), both(moved(2e-15)), ["logits"])
    verdict = Verdict(comparisons, reference, {"timm": "1"})
    assert str(verdict).startswith("the same function in float64: 1 output, worst error 2.")
    assert str(verdict).endswith("of 1.0e-10 allowed (logits on probe)")
    assert verdict.warnings == ("no float64: on one output",)
    document = json.loads(verdict.to_json())
    assert (document["verification"], document["passed"], document["precision"]) == (1, True, "float64")
    assert document["comparisons"][0]["bounds"] == [1e-10, 1e-10]
    mixed = compare({**both(RIGHT)}, both(RIGHT), ["logits"]) + compare(
        activations(float32=RIGHT), both(RIGHT), ["logits"]
    )
    assert Verdict(mixed, {}, {}).precision == "float32" and Verdict(mixed, {}, {}).passed
    assert str(Verdict((), {}, {})) == "not verified: nothing was compared"
