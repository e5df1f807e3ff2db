"""Presets are untrusted input: what is wrong with one is said before anything is allocated."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vllm_kvpca.errors import PresetInvalid, PresetMismatch, PresetNotFound
from vllm_kvpca.preset import (
    FORMATS,
    ModelShape,
    Preset,
    PresetConfig,
    TensorFormat,
    find,
    load_preset,
    save_preset,
)
from vllm_kvpca.preset import basis_file as basis_module
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS
from vllm_kvpca.preset.identity import Served

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
    (folder / "config.json").write_text(" " * (find.MAX_BYTES["config.json"] + 1))
    refused(folder, r"larger than 65536 bytes")


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


TOO_LARGE = [
    ("model", {"num_layers": 10**7}, r"model\.num_layers: .*less than or equal to 1024"),
    ("model", {"num_layers": 10**4000}, r"model\.num_layers: "),
    ("model", {"num_layers": 0}, r"model\.num_layers: .*greater than 0"),
    ("model", {"num_kv_heads": 10**7}, r"model\.num_kv_heads: .*less than or equal to 1024"),
    ("model", {"head_dim": 10**9}, r"model\.head_dim: .*less than or equal to 1024"),
    ("model", {"name": "x" * 30_000}, r"model\.name: .*at most 256"),
    ("model", {"revision": "x" * 30_000}, r"model\.revision: .*at most 256"),
    (None, {"description": "x" * 30_000}, r"description: .*at most 4096"),
    (None, {"format": "x" * 30_000}, r"format: .*at most 64"),
    (None, {"layers": [1] * 9000}, r"layers: .*at most 1024"),
    (None, {"layers": [-1] * 9000}, r"layers\.0: .*greater than or equal to 0"),
    (None, {f"field{i}": i for i in range(3000)}, r"field0: Extra inputs .*2999 more"),
    (None, {"layers": []}, r"layers: .*at least 1"),
    (None, {"layers": [10**30]}, r"layers\.0: .*less than 1024"),
    (None, {"layers": [-1]}, r"layers\.0: .*greater than or equal to 0"),
    (None, {"layers": [0, 0]}, r"layers \[0, 0\] must be different"),
    (None, {"layers": [0, LAYERS]}, r"must be different indices below 3"),
    (None, {"schema_version": 10**7}, r"schema_version"),
    (None, {"k": one_band(10**7)}, r"k\.bands\.0\.bits"),
    (None, {"k": one_band(8, share=10**4000)}, r"k\.bands\.0\.share"),
    (None, {"k": one_band(8, share=1e-300)}, r"k: .*add up to 1"),
    (None, {"k": {"basis": "x" * 30_000, "bands": []}}, r"k\.basis"),
    (None, {"k": {"basis": "pca", "bands": [{"share": "1", "bits": 8}] * 2000}}, "at most 16"),
]


@pytest.mark.parametrize(("part", "changes", "words"), TOO_LARGE, ids=range(len(TOO_LARGE)))
def test_every_number_list_and_string_has_a_limit(folder, part, changes, words):
    """Refused for the price of the file itself: at most 64 KiB, not of what it says."""
    if part:
        changes = {part: json.loads((folder / "config.json").read_text())[part] | changes}
    edit_config(folder, **changes)
    tracemalloc.start()
    begun = time.process_time()
    try:
        refused(folder, words)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - begun < 1


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
    monkeypatch.setitem(find.MAX_BYTES, "basis.safetensors", 1000)
    refused(folder, r"larger than 1000 bytes")


@pytest.fixture
def nothing_read(monkeypatch):
    """Fails if a tensor is read."""

    class Header:
        def __init__(self, *arguments):
            self.file = safe_open(*arguments)

        def __enter__(self):
            self.file.__enter__()
            return self

        def __exit__(self, *error):
            return self.file.__exit__(*error)

        def __getattr__(self, name):
            assert name != "get_tensor", "a tensor was read"
            return getattr(self.file, name)

    monkeypatch.setattr(basis_module, "safe_open", Header)


def write_header(folder: Path, header: object, size: int, length: int | None = None) -> None:
    """A basis file with any header and `size` bytes of (sparse) data behind it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with (folder / "basis.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text) if length is None else length) + text)
        file.truncate(8 + len(text) + size)


def entry(dtype: str, shape: tuple[int, ...], end: int, begin: int = 0) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


RIGHT = (LAYERS, KV_HEADS, HEAD_DIM, HEAD_DIM)
RIGHT_BYTES = 2 * LAYERS * KV_HEADS * HEAD_DIM**2


@pytest.mark.parametrize(
    ("header", "size", "length", "words"),
    [
        (b"{}", 0, 2**63, r"header is said to be 9,223,372,036,854,775,808 bytes"),
        (b"{}", 0, 10**8, r"header is said to be 100,000,000 bytes"),
        ({"__metadata__": {"x": "y" * 90_000}}, 0, None, r"header is said to be 90,"),
        (b"[" * 60_000, 0, None, r"cannot be read"),
        (b"\xff" * 100, 0, None, r"cannot be read"),
        ({"v_basis": entry("F16", (2**40,), 2**41)}, 0, None, r"cannot be read"),
        ({"v_basis": entry("F32", (2**14, 2**14), 2**30)}, 2**30, None, r"larger than"),
        (
            {"v_basis": entry("F32", (2**13, 2**13), 2**28)},
            2**28,
            None,
            r"dimensions \(8192, 8192\), not",
        ),
        # Offsets that do not fit the shape, lie outside, or leave a gap.
        ({"v_basis": entry("F16", RIGHT, 8)}, RIGHT_BYTES, None, r"cannot be read"),
        ({"v_basis": entry("F16", RIGHT, RIGHT_BYTES)}, 8, None, r"cannot be read"),
        ({"v_basis": entry("F16", RIGHT, RIGHT_BYTES)}, 2**28, None, r"cannot be read"),
        ({f"t{i}": entry("F16", (0,), 0) for i in range(999)}, 0, None, r"not the tensors"),
    ],
    ids=range(12),
)
def test_a_header_that_lies_costs_nothing(folder, nothing_read, header, size, length, words):
    write_header(folder, header, size, length)
    tracemalloc.start()
    try:
        refused(folder, words)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_bases_declared_larger_than_any(folder, nothing_read):
    shape = json.loads((folder / "config.json").read_text())["model"]
    edit_config(folder, model=shape | {"num_layers": 1024, "num_kv_heads": 1024, "head_dim": 1024})
    refused(folder, r"declares, [\d,]+ bytes, are larger than")


@pytest.mark.parametrize("names", [["k_basis"], ["v_basis", "k_basis"], ["V"], []])
def test_wrong_tensor_names(folder, names):
    write_basis(folder, **{name: orthonormal().half() for name in names})
    refused(folder, r"not the tensors \['v_basis'\]")


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((LAYERS - 1, KV_HEADS, HEAD_DIM, HEAD_DIM), "layers 2, not 3"),
        ((LAYERS, KV_HEADS + 1, HEAD_DIM, HEAD_DIM), "num_kv_heads 3, not 2"),
        ((LAYERS, KV_HEADS, HEAD_DIM, HEAD_DIM // 2), "head_dim 32, not 64"),
        ((LAYERS, 1, 128, 128), "num_kv_heads 1, not 2, head_dim 128, not 64"),
        (
            (LAYERS, KV_HEADS, HEAD_DIM * HEAD_DIM),
            r"dimensions \(3, 2, 4096\), not \(3, 2, 64, 64\)",
        ),
        ((0,), r"dimensions \(0,\), not \(3, 2, 64, 64\)"),
    ],
)
def test_a_basis_of_another_shape(folder, shape, words):
    write_basis(folder, v_basis=torch.zeros(shape))
    refused(folder, rf"another shape than config\.json says: v_basis has {words}\. Download")


def test_bases_of_some_layers_are_as_many_as_config_lists(tmp_path):
    save_preset(tmp_path, make_config(layers=(0, 2)), {"v": orthonormal(3)}, "")
    refused(tmp_path, "v_basis has layers 3, not 2")


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.int32, "I32"), (torch.float8_e4m3fn, "F8_E4M3"), (torch.float64, "F64")],
)
def test_a_basis_of_another_dtype(folder, dtype, name):
    write_basis(folder, v_basis=orthonormal().to(dtype))
    refused(folder, f"v_basis is {name}.*not F16 or F32")


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
    "num_layers": LAYERS,
    "num_kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "layers": [0, 1, 2],
}


@pytest.mark.parametrize(
    "name", ["org/Model-1B", "other/model-1b", "/srv/Model-1B/", "models--org--Model-1B"]
)
def test_without_weights_the_model_is_known_by_the_last_part_of_its_name(folder, name):
    assert load_preset(folder).check_weights(Served(name)) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_layers": 4}, r"num_layers 3 \(the model has 4\)"),
        ({"num_kv_heads": 8}, r"num_kv_heads 2 \(the model has 8\)"),
        ({"head_dim": 128}, r"head_dim 64 \(the model has 128\)"),
        ({"layers": [0, 1, 3]}, r"no basis for layers \[3\]"),
    ],
)
def test_another_shape_is_refused_with_the_way_out(folder, changes, words):
    with pytest.raises(PresetMismatch, match=words) as refusal:
        load_preset(folder).check_shape(**(MODEL | changes))
    assert "k8v4" in str(refusal.value) and "vllm-kvpca calibrate" in str(refusal.value)


def test_layers_without_a_basis_are_named(tmp_path):
    save_preset(tmp_path, make_config(layers=(1,)), {"v": orthonormal(1)}, "")
    with pytest.raises(PresetMismatch, match=r"no basis for layers \[0, 2\]"):
        load_preset(tmp_path).check_shape(**MODEL)
    load_preset(tmp_path).check_shape(**(MODEL | {"layers": [1]}))


def test_formats_without_calibration_fit_any_model():
    load_preset("k8v4").check_shape(80, 8, 128, list(range(80)))
