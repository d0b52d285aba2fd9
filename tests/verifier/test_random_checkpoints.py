from __future__ import annotations

import timm
import torch

from converters.verifier.probes import probes


def test_no_tensor_of_a_random_checkpoint_hides_a_fault(converted):
    """Rolling any one tensor by a channel moves the logits by far more than float32 rounding would."""
    model = timm.create_model(f"local-dir:{converted.folder}", pretrained=True).eval().double()
    x = torch.from_numpy(probes((3, 64, 64))["normal"]).double()
    effects = {}
    with torch.no_grad():
        right = model(x)
        assert (right.max(0).values - right.min(0).values).max() > 0.1 * right.abs().max()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                kept = tensor.clone()
                tensor.copy_(kept.roll(1, 0))
                effects[name] = float((model(x) - right).abs().max() / right.abs().max())
                tensor.copy_(kept)
    assert len(effects) == 102
    assert min(effects.values()) > 1e-2, min(effects, key=effects.__getitem__)
