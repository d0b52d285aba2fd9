"""What timm's side gives, by the names of the outputs."""

from __future__ import annotations

import numpy as np
import timm
import torch

from converters.verifier.target import gives_features, run_model


def test_a_model_of_features_gives_those_that_are_asked_for() -> None:
    model = timm.create_model("mobilenetv2_035", features_only=True).eval()
    x = np.random.default_rng(0).standard_normal((1, 3, 64, 64), dtype="float32")
    found = run_model(model, x, ["logits", "features.1", "features.4"])
    with torch.no_grad():
        maps = model(torch.from_numpy(x))
    assert gives_features(model) and not gives_features(timm.create_model("mobilenetv2_035"))
    assert {name: array.tolist() for name, array in found.items()} == {
        "features.1": maps[1].tolist(),
        "features.4": maps[4].tolist(),
    }
