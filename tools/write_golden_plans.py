"""Write tests/plans/: what every family's plan looks like, from the names and shapes of real source models.

    python tools/write_golden_plans.py [FAMILY...]

For each family `FAMILY.specs.json` holds the source tensors of a few targets, as the source framework's own
model wrote them and the readers list them, and `FAMILY.txt` the plans, folded. The tests compare the plans of
today with that text. Run this after a change that is meant, and read the difference. The models are the smallest
of each of the family's references, or what SOURCES has for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from converters.closing import Unbuilt, ask, build, close
from converters.detection import find_plan
from converters.mapping import find_mappings, load_mapping
from converters.plan import Plan
from converters.readers import Checkpoint, open_checkpoint
from converters.reports.plans import plan_text
from converters.tensors import LazyTensor, TensorSpec
from converters.verifier.worker import run_task

ROOT = Path(__file__).parents[1]
PLANS, PARITY = ROOT / "tests" / "plans", ROOT / "tests" / "parity"
Specs = dict[str, Any]  # name -> shape; a dtype behind it where it is not float32


def plans_of(path: Path) -> Iterator[tuple[str, Plan]]:
    """Each target of a specs file with the plan that is found for it, unaided but for a timm model's name."""
    for title, source in json.loads(path.read_text("utf-8")).items():
        tensors = {name: _unread(name, *given) for name, given in source["tensors"].items()}
        yield title, find_plan(Checkpoint(Path(title), "specs", tensors, metadata=source["metadata"]))


def _unread(name: str, shape: list[int], dtype: str = "float32") -> LazyTensor:
    def read() -> memoryview:
        raise AssertionError(f"{name}: a plan reads nothing")

    return LazyTensor(TensorSpec(name, tuple(shape), dtype), read)


def written(spec: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint that the source framework writes, as `random_checkpoints` takes it, opened."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("source.weights.h5" if spec["framework"] == "keras" else "source.pth")
        return open_checkpoint(_parity("random_checkpoints").write_checkpoint(spec, path))


def mmdet(model: Mapping[str, Any]) -> Callable[[], Specs]:
    return lambda: _source(written({"framework": "mmdet", "model": model, "wrap": "detector"}))


def mmseg(model: Mapping[str, Any]) -> Callable[[], Specs]:
    return lambda: _source(written({"framework": "mmseg", "model": model}))


def mmpretrain(backbone: Mapping[str, Any], features: int, size: int = 64) -> Callable[[], Specs]:
    model = {
        "type": "ImageClassifier",
        "backbone": backbone,
        "neck": {"type": "GlobalAveragePooling"},
        "head": {"type": "LinearClsHead", "num_classes": 1000, "in_channels": features},
    }
    return lambda: _source(written({"framework": "mmpretrain", "model": model, "input": [1, 3, size, size]}))


def keras(application: str, **args: Any) -> Callable[[], Specs]:
    def build() -> Specs:
        with tempfile.TemporaryDirectory() as folder:
            model = {"runner": "keras", "model": {"application": application, "args": args}}
            job = {"task": "list_tensors", "runner": "keras", "models": [model], "folder": folder}
            (answer,) = run_task(job)["models"]
            return _source(open_checkpoint(answer["file"]))

    return build


def tpu(application: str) -> Callable[[], Specs]:
    """Keras's implementation under the names of the TPU graph."""
    code = f"""
import json, keras, sys
model = keras.applications.{application}(weights=None)
layers = {{layer.name: [(v.name, tuple(v.shape)) for v in layer.weights] for layer in model.layers}}
json.dump(layers, open(sys.argv[1], "w"))
"""

    def build() -> Specs:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "layers.json"
            subprocess.run([sys.executable, "-c", code, str(path)], check=True, capture_output=True)
            layers = json.loads(path.read_text())
        tensors = {}
        for layer, scope in _parity("tensorflow_efficientnet").tpu_names(list(layers)).items():
            for name, shape in layers[layer]:
                role = "depthwise_kernel" if layer.endswith("dwconv") else name
                tensors[f"efficientnet-{application[-2:].lower()}/{scope}/{role}"] = [shape]
        return {"metadata": {}, "tensors": tensors}

    return build


def timm(architecture: str, named: bool = False, **args: Any) -> Callable[[], Specs]:
    """timm's own model; `named` as its training script saves it."""

    def build() -> Specs:
        import timm
        import torch

        with torch.device("meta"):
            state = timm.create_model(architecture, **args).state_dict()
        tensors = {name: _listed(tuple(value.shape), str(value.dtype)) for name, value in state.items()}
        return {"metadata": {"arch": architecture} if named else {}, "tensors": tensors}

    return build


def released(release: str, architecture: str, named: bool = False) -> Callable[[], Specs]:
    """A model of a past timm; `named` as its training script saves it."""

    def build() -> Specs:
        from released_timm import tensors_of

        tensors = tensors_of(release, architecture)
        listed = {name: _listed(shape, dtype) for name, (shape, dtype) in tensors.items()}
        return {"metadata": {"arch": architecture} if named else {}, "tensors": listed}

    return build


SOURCES: dict[str, dict[str, Callable[[], Specs]]] = {
    "mmlab/swin": {
        "an MMDetection backbone": mmdet(
            {"type": "SwinTransformer", "embed_dims": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]}
        ),
        "an MMPretrain classifier": mmpretrain(
            {
                "type": "SwinTransformer",
                "arch": "base",
                "img_size": 384,
                "stage_cfgs": {"block_cfgs": {"window_size": 12}},
            },
            1024,
            384,
        ),
    },
    "mmlab/resnet": {
        "an MMDetection backbone": mmdet({"type": "ResNet", "depth": 18}),
        "an MMPretrain classifier with a deep stem": mmpretrain({"type": "ResNetV1d", "depth": 50}, 2048),
        "an MMSegmentation backbone": mmseg({"type": "ResNetV1c", "depth": 50}),
    },
    "mmlab/timm_backbone": {
        "a classifier": mmpretrain({"type": "TIMMBackbone", "model_name": "mobilenetv4_conv_small"}, 1280),
    },
    "keras/mobilenet_v2": {
        "a classifier": keras("MobileNetV2", alpha=0.35, input_shape=[96, 96, 3]),
        "no top": keras("MobileNetV2", include_top=False, input_shape=[96, 96, 3]),
    },
    **{
        f"keras/{family}": {"a classifier": keras(application, classes=10, input_shape=[size, size, 3])}
        for family, application, size in (
            ("densenet", "DenseNet121", 96),
            ("efficientnet", "EfficientNetB0", 96),
            ("efficientnet_v2", "EfficientNetV2B0", 96),
            ("inception_resnet_v2", "InceptionResNetV2", 96),
            ("mobilenet", "MobileNet", 96),
            ("mobilenet_v3", "MobileNetV3Small", 96),
            ("xception", "Xception", 96),
        )
    },
    "tensorflow/efficientnet": {"b0": tpu("EfficientNetB0"), "b2": tpu("EfficientNetB2")},
    "timm/native": {
        "named": timm("vit_tiny_patch16_224", named=True, num_classes=10),
        "known by its tensors": timm("mobilenetv4_conv_small"),
        "0.9.2, with buffers": released("0.9.2", "beit_base_patch16_224", named=True),
        "1.0.9, with buffers": released("1.0.9", "efficientvit_m0"),
    },
    "timm/features": {"a pyramid": timm("vit_tiny_patch16_224", named=True, features_only=True)},
    "timm/only_features": {
        "flattened": timm("swin_tiny_patch4_window7_224", named=True, features_only=True),
        "not flattened": timm("mobilenetv3_small_050", named=True, features_only=True),
    },
    "timm/levit_before_0_9": {"0.6.13": released("0.6.13", "levit_128s")},
    "timm/pit_before_0_9": {"0.6.13": released("0.6.13", "pit_ti_224")},
    "timm/poolformer_before_0_9": {"0.6.13": released("0.6.13", "poolformer_s12")},
    "timm/representation_before_0_9": {"0.4.12": released("0.4.12", "vit_large_patch32_224_in21k", named=True)},
    "timm/sequencer_before_0_9": {"0.6.13": released("0.6.13", "sequencer2d_s")},
    "timm/swin_before_0_9": {
        "0.6.13, v1": released("0.6.13", "swin_tiny_patch4_window7_224"),
        "0.6.13, v2": released("0.6.13", "swinv2_tiny_window8_256"),
    },
    "timm/swin_v2_cr_before_0_9": {"0.6.13": released("0.6.13", "swinv2_cr_tiny_224", named=True)},
    "timm/tnt_before_1_0_20": {"1.0.9": released("1.0.9", "tnt_s_patch16_224")},
    "timm/tresnet_before_0_9": {"0.6.13": released("0.6.13", "tresnet_m")},
}


def of_references(family: str) -> dict[str, Specs]:
    """What the smallest model of each reference has."""
    mapping, found = load_mapping(family), dict[int, Specs]()
    titles = dict[int, str]()
    with tempfile.TemporaryDirectory() as folder:
        questions = sorted(ask(mapping, (), None), key=lambda one: one.parameters)
        for question, specs in build(questions, Path(folder)).items():
            closing = (
                None if isinstance(specs, Unbuilt) or question.number in found else close(mapping, question, specs)
            )
            if closing and closing.outcome == "closes":
                title = f"{question.block['runner']}, {question.target}"
                again = f", reference {question.number + 1}" if title in titles.values() else ""
                titles[question.number] = title + again
                found[question.number] = _source(closing.checkpoint)
    return {titles[number]: found[number] for number in sorted(found)}


def _source(checkpoint: Checkpoint) -> Specs:
    tensors = {name: _listed(spec.shape, spec.dtype) for name, spec in checkpoint.specs.items()}
    return {"metadata": checkpoint.metadata, "tensors": tensors}


def _listed(shape: tuple[int, ...], dtype: str) -> list[Any]:
    dtype = dtype.removeprefix("torch.")
    return [list(shape)] if dtype == "float32" else [list(shape), dtype]


def _parity(name: str) -> Any:
    spec = spec_from_file_location(name, PARITY / f"{name}.py")
    assert spec and spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _json(sources: Mapping[str, Specs]) -> str:
    """A line for each tensor."""
    texts = []
    for title, source in sources.items():
        lines = [f"  {json.dumps(name)}: {json.dumps(given)}" for name, given in source["tensors"].items()]
        head = f' {json.dumps(title)}: {{"metadata": {json.dumps(source["metadata"])}, "tensors": {{'
        texts.append("\n".join([head, ",\n".join(lines), " }}"]))
    return "{\n" + ",\n".join(texts) + "\n}\n"


def main(families: list[str]) -> None:
    for family in families or find_mappings():
        path = PLANS / f"{family}.specs.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        own = {title: build() for title, build in SOURCES.get(family, {}).items()}
        if not (sources := own or of_references(family)):
            print(f"{family}: no reference that closes")
            continue
        path.write_text(_json(sources), "utf-8")
        text = "\n".join(f"{title}: {plan_text(plan)}" for title, plan in plans_of(path))
        path.with_name(path.name.replace(".specs.json", ".txt")).write_text(text, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
