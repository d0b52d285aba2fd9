"""The demo: the main job on a checkpoint that was really trained, with no download.

A Keras MobileNetV2 that reads scikit-learn's handwritten digits lies in this folder, with the framework's own
logits for 400 held-out images beside it (`tools/train_demo.py` made both). The demo converts it, loads the
result the way a user would, and compares.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.conversion import Conversion, Inspection, Progress, convert, inspect

if TYPE_CHECKING:
    from converters.verifier import Verdict

__all__ = ["CHECKPOINT", "RECORDING", "Demo", "run_demo"]

CHECKPOINT = Path(__file__).parent / "digits.weights.h5"
RECORDING = Path(__file__).parent / "digits.recording.npz"
PIXELS = 32  # a side; nothing in the checkpoint tells


@dataclass(frozen=True)
class Demo:
    """What the demo showed; accuracies are shares of the held-out images."""

    inspection: Inspection
    conversion: Conversion
    verdict: Verdict
    accuracy_before: float
    accuracy_after: float


def run_demo(directory: Path, progress: Progress | None = None) -> Demo:
    """Inspect, convert to `directory`, and verify. Raises ConverterError."""
    from converters.verifier import verify

    inspection = inspect(CHECKPOINT)
    conversion = convert(CHECKPOINT, directory, img_size=PIXELS, overwrite=True, progress=progress)
    verdict = verify(directory, CHECKPOINT, reference=str(RECORDING))
    (logits,) = verdict.comparisons
    return Demo(
        inspection, conversion, verdict, logits.information["reference_accuracy"], logits.information["accuracy"]
    )
