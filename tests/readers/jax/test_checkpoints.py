"""What Flax, Orbax and NumPy write is read back bit for bit, under the names of the model's modules."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from converters.errors import CheckpointError
from converters.readers import open_checkpoint
from converters.readers.jax import flax, orbax
from converters.readers.numpy import npz

GENERATOR = Path(__file__).with_name("forms.py")
FORMS = {  # what is taken off
    "msgpack": ("params + batch_stats",),
    "msgpack_training": ("params + batch_stats",),
    "msgpack_dtypes": (),
    "msgpack_chunked": ("params",),
    "npz": (),
    "npz_deflated": ("params",),
    "npz_training": ("opt", "target"),
    "npz_dtypes": (),
    "orbax": ("params + batch_stats",),
    "orbax_folders": ("params + batch_stats",),
    "orbax_zarr3": ("params + batch_stats",),
    "orbax_manager": ("params + batch_stats",),
    "orbax_dtypes": (),
    "orbax_nnx": ("/value",),
}
READERS = {"msgpack": flax, "npz": npz, "orbax": orbax}


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jax")
    subprocess.run([sys.executable, GENERATOR, folder], check=True, timeout=300, capture_output=True)
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_bit_for_bit(form: str, forms: Path) -> None:
    expected = json.loads((forms / "expected.json").read_text())
    assert set(expected) == set(FORMS)
    checkpoint = open_checkpoint(forms / form)
    found = {n: [t.spec.dtype, list(t.spec.shape), t.read().hex()] for n, t in sorted(checkpoint.tensors.items())}
    assert found == expected[form]
    assert checkpoint.wrappers == FORMS[form]
    assert checkpoint.format == READERS[form.partition("_")[0]].FORMAT


def test_what_is_no_weight_is_set_aside_or_metadata(forms: Path) -> None:
    assert open_checkpoint(forms / "msgpack_training").set_aside == {"opt_state/**": "optimizer state"}
    assert open_checkpoint(forms / "npz_training").set_aside == {"opt/**": "optimizer state"}
    assert open_checkpoint(forms / "orbax").set_aside == {"opt_state/**": "optimizer state", "step": "step counter"}
    assert open_checkpoint(forms / "orbax_nnx").set_aside == {"**/rngs/**": "random generator state"}
    assert open_checkpoint(forms / "orbax_dtypes").metadata == {"text": "left out: it holds a string"}
    metadata = open_checkpoint(forms / "msgpack_dtypes").metadata
    assert metadata["large"] == 1 << 40
    assert [metadata[f"negative/{number}"] for number in range(4)] == [-3, -300, -70_000, -(1 << 40)]
    assert (metadata["text"], metadata["none"], metadata["no"], metadata["float"]) == ("hi", None, False, 0.5)
    assert metadata["complex"] == "left out: an extension of type 2"


def test_bfloat16_of_npz_is_noted(forms: Path) -> None:
    notes = open_checkpoint(forms / "npz_dtypes").notes
    assert notes == ("two bytes of unnamed type are read as bfloat16 in 1 arrays",)


def test_integrity_is_what_the_format_has(forms: Path) -> None:
    assert {form: open_checkpoint(forms / form).integrity for form in ("msgpack", "npz", "orbax", "orbax_folders")} == {
        "msgpack": "none in format",
        "npz": "CRC-32 of every array",
        "orbax": "CRC-32C of the database's index and of small arrays",
        "orbax_folders": "none in format",
    }


@pytest.mark.parametrize("form", ["orbax", "orbax_folders", "orbax_zarr3", "orbax_manager"])
def test_without_metadata_the_paths_tell_the_names(form: str, forms: Path, tmp_path: Path) -> None:
    shutil.copytree(forms / form, tmp_path / form)
    for path in (tmp_path / form).rglob("_METADATA"):
        path.unlink()
    listed, found = open_checkpoint(forms / form), open_checkpoint(tmp_path / form)
    assert (found.specs, found.wrappers) == (listed.specs, listed.wrappers)
    assert all(found.tensors[name].read() == tensor.read() for name, tensor in listed.tensors.items())
    assert any("without _METADATA" in note for note in found.notes)


def test_a_folder_of_several_steps_asks_which(forms: Path, tmp_path: Path) -> None:
    for step in ("1", "2"):
        (tmp_path / step).mkdir()
        (tmp_path / step / "default").symlink_to(forms / "orbax_manager" / "7" / "default")
    with pytest.raises(CheckpointError, match=r"holds 2 checkpoints \(1/default, 2/default\); name one of them"):
        open_checkpoint(tmp_path)


def test_one_array_is_no_state_dict(tmp_path: Path) -> None:
    import numpy as np

    np.save(tmp_path / "x.npy", np.ones(3))
    with pytest.raises(CheckpointError, match="is one array without a name, not a state dict; save all arrays by name"):
        open_checkpoint(tmp_path / "x.npy")


def test_without_tensorstore_the_cure_is_named(forms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorstore", None)
    with pytest.raises(CheckpointError, match="which needs tensorstore; pip install tensorstore"):
        open_checkpoint(forms / "orbax")


def test_the_digest_is_of_all_files(forms: Path) -> None:
    checkpoint = open_checkpoint(forms / "orbax")
    names = [file.path.relative_to(forms / "orbax").as_posix() for file in checkpoint.files]
    assert {"_METADATA", "manifest.ocdbt", "ocdbt.process_0/manifest.ocdbt"} < set(names)
    assert len(checkpoint.sha256()) == 64
    for file in checkpoint.files:
        file.check_unchanged()


@pytest.mark.parametrize("form", ["msgpack", "npz", "orbax"])
def test_reading_imports_no_jax(form: str, forms: Path) -> None:
    program = (
        "import sys; from converters.readers import open_checkpoint\n"
        "[tensor.read() for tensor in open_checkpoint(sys.argv[1]).tensors.values()]\n"
        "print({'jax', 'flax', 'msgpack', 'orbax', 'torch'} & set(sys.modules))"
    )
    here = Path(flax.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program, forms / form], check=True, capture_output=True, text=True, cwd=here
    )
    assert done.stdout == "set()\n"
