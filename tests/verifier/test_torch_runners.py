"""The runners of torch models, each with its real library. Only whole verifications go through the worker."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.conversion import convert
from converters.verifier import verify
from converters.verifier.probes import probes
from converters.verifier.worker import REFERENCES

RESNET = {"name": "resnet18", "args": {"num_classes": 10}}
X = probes((3, 64, 64))["normal"]


@pytest.fixture(scope="module")
def resnet(write_checkpoint, tmp_path_factory) -> Path:
    """torchvision's ResNet-18 as a training script saves it: raw and averaged weights, an optimizer."""
    path = tmp_path_factory.mktemp("torchvision") / "epoch_9.pth"
    state = torch.load(write_checkpoint({"framework": "torchvision", "model": RESNET}, path), weights_only=True)
    raw = {name: value * 1.01 if value.is_floating_point() else value for name, value in state.items()}
    ema = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 9, "model": raw, "model_ema": ema, "optimizer": {"state": {}, "param_groups": []}}, path)
    return path


@pytest.fixture
def runner(monkeypatch):
    """A runner's module, imported as the worker imports it."""
    monkeypatch.setattr(sys, "path", [str(REFERENCES), *sys.path])
    flags = torch.backends.cudnn.allow_tf32

    def load(name: str) -> ModuleType:
        return importlib.import_module(f"run_{name}")

    yield load
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.allow_tf32 = flags


def job(source: Path, model: dict, *outputs: str, **more) -> dict:
    return {"model": model, "outputs": outputs or ("0",), "source": {"file": str(source), **more}}


def true_outputs(source: Path, precision: str) -> dict[str, np.ndarray]:
    """What torchvision itself gives, filled by torch's own strict loader."""
    import torchvision

    model = torchvision.models.resnet18(num_classes=10).to(getattr(torch, precision)).eval()
    state = torch.load(source, weights_only=True)["model_ema"]
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    found = {}
    model.layer4.register_forward_hook(lambda _module, _inputs, given: found.update(layer4=given.numpy()))
    with torch.no_grad():
        return {"0": model(torch.from_numpy(X.astype(precision))).numpy(), **found}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize(
    ("name", "model"),
    [("torchvision", RESNET), ("timm", {"architecture": "resnet18", "args": {"num_classes": 10}})],
)
def test_runners_by_name(resnet, runner, name, model, precision):
    given = job(resnet, model, "0", "layer4", "layer4.1.bn2", wrappers=["model_ema", "module."])
    run, facts = runner(name).build(given, precision)
    found, right = run(X.astype(precision)), true_outputs(resnet, precision)
    for output, array in right.items():
        assert found[output].dtype == precision
        np.testing.assert_allclose(found[output], array, rtol=0, atol=1e-12 if precision == "float64" else 1e-4)
    assert (found["layer4"] >= 0).all() and (found["layer4.1.bn2"] < 0).any()
    assert facts == {"prefix": "", "unexpected": []}
    assert runner(name).construct({"model": model}).fc.weight.shape == (10, 512)


@pytest.mark.parametrize(
    ("wrappers", "factor"),
    [(["model"], 1.01), (["model_ema", "module."], 1.0), (["model_ema"], 1.0), (["elsewhere", "model"], 1.01)],
)
def test_the_state_dict_is_the_one_that_was_converted(resnet, runner, wrappers, factor):
    run, _ = runner("torchvision").build(job(resnet, RESNET, "fc", wrappers=wrappers), "float64")
    weight = run.modules.find("fc").weight
    state = torch.load(resnet, weights_only=True)["model_ema"]
    assert torch.allclose(weight, state["module.fc.weight"].double() * factor, rtol=1e-6)


def test_framework_and_user_choose_between_state_dicts(runner, tmp_path):
    """`key` is where the framework looks; what the user chose goes before it."""
    runner("torchvision")
    from torch_models import read_state

    torch.save({"state_dict": {"a": torch.zeros(1)}, "ema": {"m": {"_orig_mod.a": torch.ones(1)}}}, tmp_path / "a.pth")
    source = {"file": str(tmp_path / "a.pth"), "wrappers": ["ema", "m", "_orig_mod."]}
    assert read_state({"source": source}, "state_dict") == {"a": torch.zeros(1)}
    assert read_state({"source": {**source, "chosen": True}}, "state_dict") == {"a": torch.ones(1)}
    assert read_state({"source": source}) == {"a": torch.ones(1)}
    copies = {"b.c": torch.zeros(1), "ema_b_c": torch.ones(1)}  # of mmcv 1.x, which exchanges both when it saves
    torch.save({"state_dict": copies}, tmp_path / "b.pth")
    raw = {"file": str(tmp_path / "b.pth"), "wrappers": ["state_dict", "ema_"], "chosen": True}
    assert read_state({"source": raw}, "state_dict")["b.c"] == 1


def test_a_saved_model_needs_trust(runner, tmp_path, monkeypatch):
    runner("torchvision")
    from torch_models import read_state

    model = torch.nn.Linear(2, 3)
    torch.save(model, tmp_path / "whole.pth")
    whole = {"source": {"file": str(tmp_path / "whole.pth")}}
    with pytest.raises(ValueError, match=r"safe mode refuses .* torch.nn.modules.linear.Linear; --trust allows it"):
        read_state(whole)
    assert read_state({**whole, "trust": True}).keys() == {"weight", "bias"}
    monkeypatch.setattr(torch, "load", lambda path, map_location: model)
    with pytest.raises(ValueError, match="has no safe mode to load the checkpoint in; --trust does without"):
        read_state(whole)
    assert read_state({**whole, "trust": True}).keys() == {"weight", "bias"}


def test_shards(runner, tmp_path):
    runner("torchvision")
    from torch_models import read_state

    model = torch.nn.Linear(2, 3)
    save_file({"weight": model.weight}, tmp_path / "1.safetensors")
    save_file({"bias": model.bias}, tmp_path / "2.safetensors")
    files = [str(tmp_path / name) for name in ("index.json", "1.safetensors", "2.safetensors")]
    assert read_state({"source": {"file": files[0], "files": files}}).keys() == {"weight", "bias"}


class Exploding:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("name", "model", "spoil", "words"),
    [
        ("torchvision", RESNET, lambda state: state.pop("module.bn1.bias"), "it lacks bn1.bias"),
        ("timm", {"architecture": "resnet34", "args": {"num_classes": 10}}, None, "it lacks layer1.2.conv1.weight, "),
        (
            "torchvision",
            RESNET,
            lambda state: state.update({"module.tail": torch.ones(1)}),
            "is of another model: it also has tail",
        ),
        ("torchvision", {"name": "resnet18"}, None, "size mismatch for fc.weight"),
        ("torchvision", {"name": "nonet"}, None, "Unknown model nonet"),
        ("timm", RESNET, lambda state: state.update(x=Exploding()), "which would call posix.system"),
    ],
)
def test_weights_that_are_not_the_models(resnet, runner, tmp_path, name, model, spoil, words):
    if spoil:
        checkpoint = torch.load(resnet, weights_only=True)
        spoil(checkpoint["model_ema"])
        torch.save(checkpoint, tmp_path / "spoilt.pth")
    given = job(tmp_path / "spoilt.pth" if spoil else resnet, {"architecture": "resnet18", **model})
    given["source"]["wrappers"] = ["model_ema", "module."]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        runner(name).build(given, "float32")
    assert words in str(caught.value)


NET = """
import numpy as np, torch
from width import WIDTH

class Net(torch.nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.fc = torch.nn.Linear(WIDTH, classes)
    def forward(self, x):
        return {"mean": x.mean((2, 3)), "pair": (self.fc(x.mean((2, 3))), x)}

class Half(Net):
    def forward(self, x):
        return self.fc(x.mean((2, 3))).softmax(-1, dtype=torch.float32).to(x.dtype)

class Placed(Net):
    def forward(self, x):
        return self.fc(x.mean((2, 3))) + self.fc(torch.arange(3).float().sin())

def reading(path, scale=1):
    state = torch.load(path, weights_only=True)
    return lambda x: {"logits": x.mean((2, 3)) @ state["fc.weight"].numpy().T.astype(x.dtype) * scale}

def plain(path):
    return lambda x: [x.mean((2, 3)).tolist(), x]

def nothing():
    return 3

class Inside:
    made = Net
"""


@pytest.fixture(scope="module")
def net(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("python")
    (folder / "net.py").write_text(NET)
    (folder / "width.py").write_text("WIDTH = 3")
    torch.manual_seed(0)
    torch.save({"fc.weight": torch.randn(2, 3), "fc.bias": torch.zeros(2)}, folder / "weights.pth")
    return folder


@pytest.mark.parametrize(
    ("factory", "args", "output", "precision"),
    [
        ("Net", {}, "pair.0", "float64"),
        ("Net", {"classes": 2}, "1.0", "float64"),
        ("Inside.made", {}, "fc", "float64"),
        ("reading", {}, "logits", "float64"),
        ("reading", {"scale": 1.0}, "0", "float32"),
    ],
)
def test_code_of_the_users_own(net, runner, factory, args, output, precision):
    model = {"module": str(net / "net.py"), "factory": factory, "args": args}
    run, _ = runner("python").build(job(net / "weights.pth", model, output), precision)
    right = X.mean((2, 3)) @ torch.load(net / "weights.pth")["fc.weight"].numpy().T
    np.testing.assert_allclose(run(X.astype(precision))[output], right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("factory", "args", "kind", "words"),
    [
        ("absent", {}, ValueError, "net.py has no absent to call"),
        ("WIDTH", {}, ValueError, "net.py has no WIDTH to call"),
        ("nothing", {}, TypeError, "the factory gives a int, which is no torch.nn.Module"),
        ("Net", {"classes": 5}, RuntimeError, "size mismatch"),
        ("Net", {"depth": 5}, TypeError, "unexpected keyword argument 'depth'"),
    ],
)
def test_code_that_gives_no_model(net, runner, factory, args, kind, words):
    model = {"module": str(net / "net.py"), "factory": factory, "args": args}
    with pytest.raises(kind, match=words):
        runner("python").build(job(net / "weights.pth", model), "float32")


def test_a_model_that_leaves_float64_says_so(net, runner):
    given = job(net / "weights.pth", {"module": str(net / "net.py"), "factory": "Half"})
    with pytest.raises(TypeError, match="the model computes parts of it in float32"):
        runner("python").build(given, "float64")[0](X.astype("float64"))
    assert runner("python").build(given, "float32")[0](X)["0"].shape == (2, 2)


def test_what_a_model_makes_in_float32_for_itself_is_widened(net, runner):
    given = job(net / "weights.pth", {"module": str(net / "net.py"), "factory": "Placed"})
    found = runner("python").build(given, "float64")[0](X.astype("float64"))["0"]
    single = runner("python").build(given, "float32")[0](X)["0"]
    assert found.dtype == "float64"
    np.testing.assert_allclose(found, single, rtol=1e-4, atol=1e-6)


def test_torchvision_confirms_a_conversion(resnet, tmp_path):
    """`resnet18` of timm and of torchvision are one; the raw weights, which the user chose, are compared."""
    folder = tmp_path / "folder"
    convert(resnet, folder, target="resnet18", ema=False, img_size=64)
    how = {"reference": "torchvision:resnet18", "outputs": ["logits=0", "features.4=layer4"]}
    verdict = verify(folder, resnet, **how)
    assert verdict.passed and verdict.precision == "float64", str(verdict)
    assert {one.output for one in verdict.comparisons} == {"logits", "features.4"}
    assert {tap.target for tap in verdict.taps} > {"conv1", "layer4.1.bn2", "fc"}
    assert verdict.reference["framework"]["torchvision"]
    record = json.loads((folder / "conversion.json").read_text())
    assert (record["source"]["key"], record["source"]["ema"]) == (None, False)
    record["source"]["ema"] = None  # then they would have been the averaged weights
    (folder / "conversion.json").write_text(json.dumps(record))
    assert not verify(folder, resnet, **how, taps=False).passed


BLOCK = {  # timm's module in a block: transformers'
    "attn.qkv": [f"attention.attention.{part}" for part in ("query", "key", "value")],
    "attn.proj": ["attention.output.dense"],
    "norm1": ["layernorm_before"],
    "norm2": ["layernorm_after"],
    "mlp.fc1": ["intermediate.dense"],
    "mlp.fc2": ["output.dense"],
}
LEAVES = ("weight", "bias")
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2, "mlp_ratio": 2, "img_size": 64, "num_classes": 10}


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    """A ViT that transformers saved in `hf`, and what the converter would write, in `timm`."""
    import transformers

    folder = tmp_path_factory.mktemp("vit")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = transformers.ViTConfig(**sizes, image_size=64, patch_size=16, num_labels=10, layer_norm_eps=1e-6)
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(0, 0.3)
    model.save_pretrained(folder / "hf")
    state = load_file(folder / "hf" / "model.safetensors")
    tensors = {"cls_token": state["vit.embeddings.cls_token"], "pos_embed": state["vit.embeddings.position_embeddings"]}
    names = {"patch_embed.proj": ["vit.embeddings.patch_embeddings.projection"], "norm": ["vit.layernorm"]}
    names["head"] = ["classifier"]
    for block in range(2):
        ours = {f"blocks.{block}.{name}": parts for name, parts in BLOCK.items()}
        names |= {name: [f"vit.encoder.layer.{block}.{part}" for part in parts] for name, parts in ours.items()}
    for name, parts in names.items():
        tensors |= {f"{name}.{leaf}": torch.cat([state[f"{part}.{leaf}"] for part in parts]) for leaf in LEAVES}
    (folder / "timm").mkdir()
    save_file(tensors, folder / "timm" / "model.safetensors", {"format": "pt"})
    cfg = {"input_size": [3, 64, 64], "num_classes": 10, "first_conv": "patch_embed.proj", "classifier": "head"}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "pretrained_cfg": cfg, "model_args": VIT}
    (folder / "timm" / "config.json").write_text(json.dumps(config))
    sha256 = hashlib.sha256((folder / "hf" / "model.safetensors").read_bytes()).hexdigest()
    record = {"family": "my/vit", "source": {"name": "model.safetensors", "sha256": sha256}}
    (folder / "timm" / "conversion.json").write_text(json.dumps(record))
    return folder


def test_transformers_confirms_a_conversion(vit):
    source = vit / "hf" / "model.safetensors"
    outputs = ["logits=logits", "forward_features=vit.layernorm"]
    verdict = verify(vit / "timm", source, reference=f"transformers:{vit / 'hf'}", outputs=outputs)
    assert verdict.passed and verdict.precision == "float64" and not verdict.warnings, str(verdict)
    assert verdict.reference["framework"]["transformers"] and verdict.reference["unexpected"] == []


def test_transformers_in_every_form(vit, runner, tmp_path):
    """A state dict inside a training script's file, a .bin, and a config that the mapping holds."""
    source = vit / "hf" / "model.safetensors"
    config = json.loads((vit / "hf" / "config.json").read_text())
    state = load_file(source)
    torch.save(state, tmp_path / "vit.bin")
    torch.save({"model": state}, tmp_path / "epoch.pth")
    build = runner("transformers").build
    given = job(source, {"folder": str(vit / "hf")}, "0", "hidden_states.2")
    right = build(given, "float32")[0](X)
    assert right["logits"].shape == (2, 10) and right["hidden_states.2"].shape == (2, 17, 32)
    for path, wrappers in (("vit.bin", []), ("epoch.pth", ["model"])):
        run, facts = build(job(tmp_path / path, {"config": config}, wrappers=wrappers), "float32")
        np.testing.assert_array_equal(run(X)["logits"], right["logits"])
        assert facts == {"unexpected": []}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "the checkpoint does not fill the model: it lacks vit."),
        ({"architectures": ["Trainer"]}, "transformers has no model class 'Trainer'"),
        ({"architectures": None}, "transformers has no model class None"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "trust_remote_code|does not recognize"),
    ],
)
def test_transformers_configs_that_do_not_fit(vit, runner, changes, words):
    config = {**json.loads((vit / "hf" / "config.json").read_text()), **changes}
    with pytest.raises((ValueError, OSError), match=words):
        runner("transformers").build(job(vit / "hf" / "model.safetensors", {"config": config}), "float32")


def test_a_second_call_is_mended(runner):
    """As where a block applies its first norm twice, and its second never."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln1, self.ln2 = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ln1(self.ln1(x))

    runner("torchvision")
    net, x = torch.nn.Sequential(Block(), Block()), torch.randn(3, 2)
    with torch.no_grad():
        wanted = net[1].ln2(net[1].ln1(net[0].ln2(net[0].ln1(x))))
        importlib.import_module("torch_models").mend(net, {"{i}.ln1": "{i}.ln2"})
        assert torch.equal(net(x), wanted) and torch.equal(net(x), wanted)
