"""A calibrated preset knows its model by the weights, whatever its name, dtype or shards."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_kvpca.calibration.collect import AttentionShape
from vllm_kvpca.calibration.fit import preset_config
from vllm_kvpca.errors import PresetInvalid, PresetMismatch
from vllm_kvpca.preset import load_preset, save_preset
from vllm_kvpca.preset.choose import choose_preset
from vllm_kvpca.preset.find import shipped_root
from vllm_kvpca.preset.identity import Served
from vllm_kvpca.preset.weights import SAMPLES, WeightSamples, of_checkpoint, of_model

LAYERS, HEADS, HEAD_DIM = 5, 2, 64
SHAPE = AttentionShape(LAYERS, HEADS, HEAD_DIM, tuple(range(LAYERS)))
WIDTH = HEADS * HEAD_DIM
NAME = "org/Original-1B"


def make_model(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=4 * HEAD_DIM,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        vocab_size=64,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture
def preset(tmp_path: Path, model):
    return make_preset(tmp_path / "preset", model)


def make_preset(folder: Path, model, quantized: str = ""):
    config = preset_config("k5v4", NAME, None, SHAPE)
    bases = torch.eye(HEAD_DIM).expand(LAYERS, HEADS, -1, -1)
    samples = of_model(model, SHAPE.layers, WIDTH, quantized)
    save_preset(folder, config, {"k": bases}, "", weights=samples)
    return load_preset(folder)


def save(model, folder: Path, **options) -> Served:
    model.save_pretrained(folder, **options)
    return Served(str(folder))


def changed(relative: float) -> LlamaForCausalLM:
    """The same model with noise of this size on every weight."""
    other = make_model()
    with torch.no_grad():
        for name, tensor in other.named_parameters():
            if "norm" not in name:
                tensor += torch.randn_like(tensor) * tensor.std() * relative
    return other


def test_samples_survive_saving_and_loading(preset, model):
    taken = of_model(model, SHAPE.layers, WIDTH)
    assert sorted(taken.layers) == [0, 2, 4]
    assert all(len(taken.layers[2][which]) == SAMPLES for which in ("k", "v"))
    assert preset.weights.difference(taken) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_copy_under_another_name_is_known(tmp_path, preset, model, dtype):
    copy = make_model().to(dtype)
    assert preset.check_weights(save(copy, tmp_path / "quite another name")) is None


def test_shards_are_read_through_their_index(tmp_path, preset, model):
    served = save(model, tmp_path / "shards", max_shard_size="200KB")
    assert len(list(Path(served.name).glob("*.safetensors"))) > 2
    assert preset.check_weights(served) is None


def test_the_name_of_the_right_model_does_not_help_another(tmp_path, preset):
    served = save(make_model(seed=1), tmp_path / "Original-1B")
    with pytest.raises(PresetMismatch, match=r"another model.*vllm-kvpca calibrate"):
        preset.check_weights(served)
    warning = preset.check_weights(served, allow_other=True)
    assert "as asked" in warning


def test_a_fine_tune_is_refused_and_allowed_when_asked(tmp_path, preset):
    served = save(changed(0.03), tmp_path / "tuned")
    with pytest.raises(PresetMismatch, match=r"by [23]\.\d%.*fine-tune.*--kv-allow-other-weights"):
        preset.check_weights(served)
    assert "measure what it costs" in preset.check_weights(served, allow_other=True)


def test_unpacked_weights_stand_for_the_original_with_a_warning(tmp_path, model):
    unpacked = make_preset(tmp_path / "preset", model, quantized="Q4_K_M")
    served = save(changed(0.08), tmp_path / "original")
    assert "unpacked from Q4_K_M" in unpacked.check_weights(served)
    with pytest.raises(PresetMismatch, match="another model"):
        unpacked.check_weights(save(make_model(seed=2), tmp_path / "other"))


def quantized_checkpoint(folder: Path) -> Served:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({"quantization_config": {"quant_method": "gptq"}})
    )
    return Served(str(folder))


def test_a_quantized_checkpoint_is_taken_by_its_name_with_a_warning(tmp_path, preset):
    warning = preset.check_weights(quantized_checkpoint(tmp_path / "Original-1B-GPTQ"))
    assert "by the model's name alone" in warning and "quantized (gptq)" in warning
    with pytest.raises(PresetMismatch, match=r"cannot be seen, because it is quantized"):
        preset.check_weights(quantized_checkpoint(tmp_path / "Something-1B-GPTQ"))


@pytest.mark.parametrize("content", [b"", b"no safetensors file"])
def test_files_that_cannot_be_read_leave_the_name(tmp_path, preset, content):
    for name in ("Original-1B", "Other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    assert "files cannot be read" in preset.check_weights(Served(str(tmp_path / "Original-1B")))
    with pytest.raises(PresetMismatch, match="files cannot be read"):
        preset.check_weights(Served(str(tmp_path / "Other")))


def test_a_model_that_is_not_downloaded_yet_is_asked_again_later(preset):
    served = Served("org/Nowhere-1B")
    assert preset.check_weights(served, later=True) is None
    with pytest.raises(PresetMismatch, match="not on this machine"):
        preset.check_weights(served)


def test_the_hub_s_cache_may_hold_a_configuration_before_the_weights(
    tmp_path, preset, model, monkeypatch
):
    """vLLM reads the configuration first; the weights come later, and then they decide."""
    repository = tmp_path / "cache" / "models--org--Tuned-1B"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    served = Served("org/Tuned-1B", download_dir=str(tmp_path / "cache"))
    assert served.folder is None and preset.check_weights(served, later=True) is None
    model.save_pretrained(snapshot)
    assert served.folder == snapshot and preset.check_weights(served) is None


def test_a_stack_of_q_k_and_v_is_cut(tmp_path, preset, model):
    tensors = {}
    for i, layer in enumerate(model.model.layers):
        parts = [getattr(layer.self_attn, f"{which}_proj").weight for which in "qkv"]
        tensors[f"model.layers.{i}.self_attn.qkv_proj.weight"] = torch.cat(parts).detach().clone()
    folder = tmp_path / "fused"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    assert preset.check_weights(Served(str(folder))) is None


def test_another_tower_s_projections_are_not_taken_for_the_model_s(tmp_path, preset, model):
    tensors = {}
    for prefix, one in (
        ("vision_tower.encoder", make_model(seed=3)),
        ("language_model.model", model),
    ):
        for i, layer in enumerate(one.model.layers):
            for which in "kv":
                weight = getattr(layer.self_attn, f"{which}_proj").weight.detach().clone()
                tensors[f"{prefix}.layers.{i}.self_attn.{which}_proj.weight"] = weight
    folder = tmp_path / "multimodal"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    assert preset.check_weights(Served(str(folder))) is None


def test_formats_without_calibration_fit_any_weights(tmp_path):
    served = save(make_model(seed=4), tmp_path / "any")
    assert load_preset("k8v4").check_weights(served) is None
    assert load_preset("Qwen--Qwen2.5-7B/kh8v4").check_weights(served) is None


def test_a_preset_without_samples_goes_by_the_name(tmp_path, model):
    folder = tmp_path / "old"
    save_preset(
        folder,
        preset_config("k5v4", NAME, None, SHAPE),
        {"k": torch.eye(HEAD_DIM).expand(LAYERS, HEADS, -1, -1)},
        "",
    )
    old = load_preset(folder)
    assert old.check_weights(save(model, tmp_path / "original-1b")) is None
    with pytest.raises(PresetMismatch, match="holds no samples"):
        old.check_weights(save(model, tmp_path / "other"))


def test_a_damaged_file_of_samples_is_refused(preset):
    path = Path(preset.name) / "weights.json"
    for text in ("", "[]", '{"layers": {}}', path.read_text().replace("0.", "nan.", 1)):
        path.write_text(text)
        with pytest.raises(PresetInvalid, match="holds no samples of weights"):
            load_preset(preset.name)


def test_auto_finds_the_preset_of_a_copy_by_its_weights(tmp_path, monkeypatch, model):
    from vllm_kvpca.preset import choose

    folder = tmp_path / "presets" / "org--Original-1B" / "k5.5v5.5"
    bases = torch.eye(HEAD_DIM).expand(LAYERS, HEADS, -1, -1)
    save_preset(
        folder,
        preset_config("k5.5v5.5", NAME, None, SHAPE),
        {"k": bases, "v": bases},
        "",
        weights=of_model(model, SHAPE.layers, WIDTH),
    )
    shipped = {"k8v4": None, "org--Original-1B/k5.5v5.5": folder}
    monkeypatch.setattr(choose, "list_shipped", lambda: shipped)
    size = (LAYERS, HEADS, HEAD_DIM)
    copy, other = save(model, tmp_path / "copy"), save(make_model(5), tmp_path / "Original-1B")
    assert choose_preset(copy, size)[0] == "org--Original-1B/k5.5v5.5"
    assert choose_preset(other, size)[0] == "k8v4"
    assert choose_preset(copy, (LAYERS, HEADS, 128))[0] == "k8v4"


def test_every_shipped_calibrated_preset_has_samples():
    for config in shipped_root().glob("*/*/basis.safetensors"):
        assert load_preset(config.parent).weights is not None, config.parent


def test_the_difference_of_nothing_in_common_is_infinite():
    one = {"k": (1.0,) * SAMPLES, "v": (1.0,) * SAMPLES}
    first, second = (WeightSamples(layers={i: one}) for i in (0, 1))
    assert first.difference(second) == float("inf")
    assert first.difference(first) == 0


def test_samples_of_a_checkpoint_are_those_of_its_model(tmp_path, model):
    served = save(model, tmp_path / "m")
    ours, theirs = (
        of_checkpoint(Path(served.name), SHAPE.layers, WIDTH),
        of_model(model, SHAPE.layers, WIDTH),
    )
    assert ours == theirs and ours.digest == theirs.digest
