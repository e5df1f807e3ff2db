"""Presets are untrusted input: what is wrong with one is said before anything is allocated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vllm_kvpca.errors import PresetInvalid, PresetMismatch, PresetNotFound
from vllm_kvpca.preset import (
    FORMATS,
    ModelShape,
    Preset,
    PresetConfig,
    TensorFormat,
    files,
    list_shipped,
    load_preset,
    save_preset,
)
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 64
SHAPE = ModelShape(name="org/Model-1B", num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)


def make_config(**changes) -> PresetConfig:
    description, k, v, *_ = CALIBRATED_FORMATS["v-mixed"]
    values = {"format": "v-mixed", "description": description, "k": k, "v": v, "model": SHAPE}
    return PresetConfig(**(values | changes))


def orthonormal(layers: int = LAYERS, head_dim: int = HEAD_DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(layers, KV_HEADS, head_dim, head_dim, generator=generator)
    return torch.linalg.qr(matrix).Q.contiguous()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_preset(tmp_path, make_config(), {"v": orthonormal()}, "# A card\n")
    return tmp_path


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def write_basis(folder: Path, **tensors: torch.Tensor) -> None:
    save_file(tensors, folder / "basis.safetensors")


def one_band(bits: int, basis: str = "identity", share: object = "1") -> dict:
    return {"basis": basis, "bands": [{"share": share, "bits": bits}]}


# --- round trip -----------------------------------------------------------------------------


def test_what_was_saved_is_loaded(folder):
    preset = load_preset(folder)
    assert preset.config == make_config()
    assert set(preset.bases) == {"v"} and preset.bases["v"].dtype == torch.float32
    torch.testing.assert_close(preset.bases["v"], orthonormal(), atol=5e-4, rtol=0)
    assert (folder / "README.md").read_text() == "# A card\n"


def test_the_files_are_plain_json_and_float16_safetensors(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["v"]["bands"][0] == {"share": "3/8", "bits": 8}
    assert load_file(folder / "basis.safetensors")["v_basis"].dtype == torch.float16


@pytest.mark.parametrize("name", list(FORMATS))
def test_formats_without_calibration_need_no_basis_file(tmp_path, name):
    save_preset(tmp_path, FORMATS[name], {}, "")
    assert load_preset(tmp_path).config == FORMATS[name]
    assert not (tmp_path / "basis.safetensors").exists()


def test_float16_keeps_a_large_basis_orthonormal_enough(tmp_path):
    shape = SHAPE.model_copy(update={"head_dim": 256, "num_layers": 1})
    save_preset(tmp_path, make_config(model=shape), {"v": orthonormal(1, 256)}, "")
    assert load_preset(tmp_path).bases["v"].shape == (1, KV_HEADS, 256, 256)


def test_bases_of_one_layer_and_rank(folder):
    preset = load_preset(folder)
    assert torch.equal(preset.basis("v", 2, [1], HEAD_DIM), preset.bases["v"][2, 1:])
    assert preset.basis("k", 2, [1], HEAD_DIM) is None


def test_bases_of_a_preset_for_some_layers(tmp_path):
    config = make_config(layers=(2, 0))
    save_preset(tmp_path, config, {"v": orthonormal(2)}, "")
    preset = load_preset(tmp_path)
    assert torch.equal(preset.basis("v", 0, [0, 1], HEAD_DIM), preset.bases["v"][1])


def test_hadamard_formats_have_the_same_basis_for_every_head():
    basis = Preset("k8v4", FORMATS["k8v4"]).basis("v", 5, [0, 3], HEAD_DIM)
    assert basis.shape == (2, HEAD_DIM, HEAD_DIM) and torch.equal(basis[0], basis[1])


# --- config.json ----------------------------------------------------------------------------


def refused(folder: Path, words: str) -> None:
    with pytest.raises(PresetInvalid, match=words):
        load_preset(folder)


def test_a_missing_config(tmp_path):
    with pytest.raises(PresetNotFound, match=r"has no config\.json"):
        load_preset(tmp_path)


def test_a_config_that_is_no_json(folder):
    (folder / "config.json").write_text('{"format": "x", ')
    refused(folder, r"not a valid preset.*Invalid JSON")


def test_a_huge_config_is_not_parsed(folder):
    (folder / "config.json").write_text(" " * (files.MAX_CONFIG_BYTES + 1))
    refused(folder, r"larger than 1048576 bytes")


def test_an_unknown_field(folder):
    edit_config(folder, colour="red")
    refused(folder, r"colour: Extra inputs are not permitted")


def test_an_unknown_schema_version(folder):
    edit_config(folder, schema_version=2)
    refused(folder, r"schema_version")


@pytest.mark.parametrize("name", ["../../etc", "", "a b", "x" * 65])
def test_a_format_name_that_is_no_name(folder, name):
    edit_config(folder, format=name)
    refused(folder, r"format: ")


@pytest.mark.parametrize(
    ("k", "words"),
    [
        (one_band(8, share="7/8"), r"k: .*shares of the bands must add up to 1"),
        (one_band(16, basis="hadamard"), r'16 bits hold raw values.*"identity"'),
        (one_band(0), r"every band has 0 bits"),
        (one_band(5), r"k\.bands\.0\.bits"),
        (one_band(8, basis="dct"), r"k\.basis"),
        ({"basis": "identity", "bands": []}, r"k\.bands: .*at least 1"),
        (one_band(8, share="0"), r"k\.bands\.0\.share: .*greater than 0"),
        (one_band(8, share="5/4"), r"k\.bands\.0\.share: .*less than or equal to 1"),
    ],
)
def test_bands_that_make_no_sense(folder, k, words):
    edit_config(folder, k=k)
    refused(folder, words)


@pytest.mark.parametrize("share", ["1/0", "1e999999999", "-1/2", "nan", "three", "", " 1"])
def test_a_share_that_is_no_fraction(folder, share):
    edit_config(folder, k=one_band(8, share=share))
    refused(folder, r'share: .*a fraction of head_dim such as "3/8"')


def test_a_calibrated_format_without_its_model(folder):
    edit_config(folder, model=None)
    refused(folder, r'the field "model" is missing')


# --- basis.safetensors ----------------------------------------------------------------------


def test_a_missing_basis_file(folder):
    (folder / "basis.safetensors").unlink()
    refused(folder, r"basis\.safetensors, which is missing.*calibrate it anew")


@pytest.mark.parametrize("kept", [0, 7, 100, 0.5, 0.999])
def test_a_truncated_basis_file(folder, kept):
    path = folder / "basis.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    refused(folder, r"cannot be read.*truncated\?.*Download it again")


def test_a_basis_file_that_is_something_else(folder):
    torch.save({"v_basis": orthonormal()}, folder / "basis.safetensors")
    refused(folder, r"cannot be read")


def test_a_huge_basis_file_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(files, "MAX_BASIS_BYTES", 1000)
    refused(folder, r"larger than 1000 bytes")


@pytest.mark.parametrize("names", [["k_basis"], ["v_basis", "k_basis"], ["V"], []])
def test_wrong_tensor_names(folder, names):
    write_basis(folder, **{name: orthonormal().half() for name in names})
    refused(folder, r"not the bases of \['v'\]")


@pytest.mark.parametrize(
    "shape",
    [
        (LAYERS - 1, KV_HEADS, HEAD_DIM, HEAD_DIM),
        (LAYERS, KV_HEADS + 1, HEAD_DIM, HEAD_DIM),
        (LAYERS, KV_HEADS, HEAD_DIM, HEAD_DIM // 2),
        (LAYERS, KV_HEADS, HEAD_DIM * HEAD_DIM),
        (0,),
    ],
)
def test_a_basis_of_another_shape(folder, shape):
    write_basis(folder, v_basis=torch.zeros(shape))
    refused(folder, r"v_basis is torch\.float32 \(.*config\.json says")


@pytest.mark.parametrize("dtype", [torch.int32, torch.float8_e4m3fn, torch.float64])
def test_a_basis_of_another_dtype(folder, dtype):
    write_basis(folder, v_basis=orthonormal().to(dtype))
    refused(folder, f"v_basis is {dtype}.*not float16 or float32")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_basis_that_is_not_finite(folder, value):
    basis = orthonormal()
    basis[1, 1, 3, 5] = value
    write_basis(folder, v_basis=basis)
    refused(folder, r"v_basis holds NaN or infinity")


@pytest.mark.parametrize("factor", [0.0, 0.99, 1.01, -2.0])
def test_a_basis_of_one_head_that_is_not_orthonormal(folder, factor):
    basis = orthonormal()
    basis[2, 1] *= factor
    write_basis(folder, v_basis=basis)
    refused(folder, r"v_basis is not orthonormal")


def balanced_config(**changes) -> PresetConfig:
    k = TensorFormat.model_validate(one_band(4, "balanced"))
    return make_config(k=k, v=FORMATS["k8v4"].v, **changes)


def test_a_balanced_basis_need_not_be_orthonormal(tmp_path):
    basis = orthonormal() * torch.logspace(-0.5, 0.5, HEAD_DIM)[:, None]
    save_preset(tmp_path, balanced_config(), {"k": basis}, "")
    loaded = load_preset(tmp_path)
    assert loaded.config == balanced_config()
    torch.testing.assert_close(loaded.bases["k"], basis, rtol=1e-3, atol=1e-6)


def test_a_balanced_basis_that_cannot_be_inverted(tmp_path):
    basis = orthonormal()
    basis[1, 0, :, 7] = basis[1, 0, :, 8]
    save_preset(tmp_path, balanced_config(), {"k": basis}, "")
    refused(tmp_path, r"k_basis cannot be inverted")


def test_v_cannot_have_a_balanced_basis(folder):
    edit_config(folder, v=one_band(4, "balanced"))
    refused(folder, r"balanced.* is for K")


# --- which model ----------------------------------------------------------------------------

MODEL = {
    "names": ["/models/org--Model-1B"],
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "layers": [0, 1, 2],
}


@pytest.mark.parametrize(
    "name", ["org/Model-1B", "other/model-1b", "/srv/Model-1B/", "models--org--Model-1B"]
)
def test_the_model_is_known_by_the_last_part_of_its_name(folder, name):
    load_preset(folder).check_model(**(MODEL | {"names": ["alias", name]}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"names": ["org/Model-7B", "alias"]}, r"it has model org/Model-1B.*'org/Model-7B'"),
        ({"num_layers": 4}, r"num_layers 3 \(the model has 4\)"),
        ({"num_kv_heads": 8}, r"num_kv_heads 2 \(the model has 8\)"),
        ({"head_dim": 128}, r"head_dim 64 \(the model has 128\)"),
        ({"layers": [0, 1, 3]}, r"no basis for layers \[3\]"),
    ],
)
def test_another_model_is_refused_with_the_way_out(folder, changes, words):
    with pytest.raises(PresetMismatch, match=words) as refusal:
        load_preset(folder).check_model(**(MODEL | changes))
    assert "k8v4" in str(refusal.value) and "vllm-kvpca calibrate" in str(refusal.value)


def test_layers_without_a_basis_are_named(tmp_path):
    save_preset(tmp_path, make_config(layers=(1,)), {"v": orthonormal(1)}, "")
    with pytest.raises(PresetMismatch, match=r"no basis for layers \[0, 2\]"):
        load_preset(tmp_path).check_model(**MODEL)
    load_preset(tmp_path).check_model(**(MODEL | {"layers": [1]}))


def test_formats_without_calibration_fit_any_model():
    load_preset("k8v4").check_model(["anything"], 80, 8, 128, list(range(80)))


# --- where a name leads ---------------------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch):
    def fail(*_, **__):
        raise ConnectionError("offline\nsecond line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)


def test_a_folder_comes_before_a_shipped_name(folder, monkeypatch, no_hub):
    (folder / "k8v4").mkdir()
    save_preset(folder / "k8v4", FORMATS["k8v8"], {}, "")
    monkeypatch.chdir(folder)
    assert load_preset("k8v4").config.format == "k8v8"


def test_a_shipped_name_comes_before_the_hub(folder, monkeypatch, no_hub):
    monkeypatch.setattr(files, "list_shipped", lambda: {"org--Model-1B/v-mixed": folder})
    assert load_preset("org--Model-1B/v-mixed").config.format == "v-mixed"


def test_shipped_folders_are_named_model_and_format(tmp_path, monkeypatch):
    save_preset(tmp_path / "org--Model-1B" / "v-mixed", make_config(), {"v": orthonormal()}, "")
    monkeypatch.setattr(files, "shipped_root", lambda: tmp_path)
    assert list(list_shipped()) == [*FORMATS, "org--Model-1B/v-mixed"]


@pytest.mark.parametrize("name", list(list_shipped()))
def test_every_shipped_preset_loads(name, no_hub):
    assert load_preset(name).name == name


def test_the_hub_is_asked_for_a_presets_files_only(folder, monkeypatch):
    asked = {}

    def download(name, allow_patterns):
        asked.update(name=name, files=allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert load_preset("someone/kv-preset").config.format == "v-mixed"
    assert asked == {
        "name": "someone/kv-preset",
        "files": ["config.json", "basis.safetensors", "README.md", "calibration.json"],
    }


def test_a_hub_that_does_not_answer(no_hub):
    words = r"no folder or shipped preset 'someone/kv-preset'.*ConnectionError: offline Known"
    with pytest.raises(PresetNotFound, match=words):
        load_preset("someone/kv-preset")


@pytest.mark.parametrize(
    "name", ["k8v5", "./missing/folder", "/missing", "~nobody-here/x", "a/b/c", "x" * 5000]
)
def test_an_unknown_name_lists_the_known_ones(name, no_hub):
    with pytest.raises(PresetNotFound, match=r"there is no preset .*k8v4.*give a folder"):
        load_preset(name)
