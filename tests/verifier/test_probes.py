from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from converters.errors import ConverterError
from converters.verifier import verify
from converters.verifier.probes import image_probes, probes

CONFIG = {
    "input_size": [3, 32, 32],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.5, 1.0],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
}


def test_probes_are_repeatable_and_their_samples_differ():
    first, second = (probes((3, 48, 40), any_size=True, batch=3) for _ in range(2))
    assert list(first) == ["normal", "ramp", "picture", "odd"]
    for name, array in first.items():
        np.testing.assert_array_equal(array, second[name])
        assert array.dtype == np.float32 and len(array) == 3 and np.isfinite(array).all()
        assert all(np.abs(array[i] - array[j]).max() > 0.1 for i in range(3) for j in range(i))
    assert not np.array_equal(probes((3, 48, 40), seed=1)["normal"], probes((3, 48, 40))["normal"])


@pytest.mark.parametrize(("side", "odd"), [(224, (169, 141)), (32, (25, 21)), (299, (225, 187))])
def test_odd_sides_are_odd_and_unequal(side, odd):
    assert probes((1, side, side), any_size=True)["odd"].shape == (2, 1, *odd)


def test_a_picture_has_edges_and_the_last_sample_has_none():
    picture, plain = probes((3, 96, 96))["picture"]
    steps = np.abs(np.diff(picture, axis=2))
    assert 0.5 < picture.std() < 2 and np.median(steps) < 0.02 < 0.5 < steps.max()
    assert np.ptp(plain, axis=(1, 2)).max() == 0 and len(np.unique(plain[:, 0, 0])) == 3


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": CONFIG}))
    (tmp_path / "images").mkdir()
    return tmp_path


def test_images_go_through_the_emitted_preprocessing(folder):
    for name, mode, colour in (("b.png", "RGB", (255, 0, 51)), ("a.JPG", "L", 255), ("c.txt", None, None)):
        path = folder / "images" / name
        Image.new(mode, (50, 40), colour).save(path, "png") if mode else path.write_text("no image")
    images = image_probes(folder, folder / "images")["images"]
    assert images.shape == (2, 3, 32, 32) and images.dtype == np.float32
    expected = (torch.tensor([[1, 1, 1], [1, 0, 0.2]]) - 0.5) / torch.tensor([0.25, 0.5, 1.0])
    np.testing.assert_allclose(images.mean(axis=(2, 3)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "images: holds no images; put files there that end in .bmp"),
        ({"a.txt": b""}, "holds no images"),
        ({"a.png": b"\x89PNG\r\n\x1a\nbroken"}, "a.png: is no image: "),
    ],
)
def test_images_that_are_none(folder, files, words):
    for name, content in files.items():
        (folder / "images" / name).write_bytes(content)
    with pytest.raises(ConverterError) as caught:
        image_probes(folder, folder / "images")
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_users_images_are_one_more_probe(converted, folder):
    rng = np.random.default_rng(0)
    for number in range(3):
        noise = rng.integers(0, 255, (80, 90, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((160, 120)).save(folder / "images" / f"{number}.png")
    verdict = verify(converted.folder, converted.source, images=folder / "images", taps=False)
    found = {(one.output, one.probe): one for one in verdict.comparisons}
    assert verdict.passed and {probe for _, probe in found} == {"normal", "ramp", "picture", "images"}
    logits = found["logits", "images"]
    assert len(logits.sample_errors) == 3 and logits.information["top5"] == 1.0
    with pytest.raises(ConverterError, match="is a recording, and images are none of its probes"):
        verify(converted.folder, converted.source, images=folder / "images", reference=str(converted.recording))
