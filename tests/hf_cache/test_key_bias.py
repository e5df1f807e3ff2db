"""A model with the K bias of Qwen2.5: why formats rotate K, and calibrated presets take it out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from vllm_kvpca import load_preset_cache
from vllm_kvpca.calibration.collect import attention_shape, collect
from vllm_kvpca.calibration.fit import fit_bases, preset_config, wanted
from vllm_kvpca.calibration.key_bias import LEAST, key_biases
from vllm_kvpca.calibration.strict import target_logprobs
from vllm_kvpca.errors import PresetInvalid
from vllm_kvpca.preset import FORMATS, load_preset, save_preset


def biased_model() -> Any:
    """Random weights; in every KV head two slow RoPE channels have a bias of 400."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        rope_theta=1e6,
    )
    model = Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.zero_().view(2, -1)
        bias[:, 15], bias[:, 31] = 400, -200
        # Queries that do not look there: the bias is one more reason for rounding, no signal.
        weight = layer.self_attn.q_proj.weight.data.view(4, 32, -1)
        weight[:, [15, 31]] = 0
    return model


def logits(model: Any, ids: torch.Tensor, preset: str | None) -> torch.Tensor:
    """Fed in pieces, so that most of what is attended to comes from the cache."""
    cache = load_preset_cache(preset, config=model.config, adaptive=False) if preset else None
    out = []
    with torch.inference_mode():
        for piece in ids.split(16, 1):
            result = model(piece, past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            out.append(result.logits)
    return torch.cat(out, 1)


def test_a_rotation_saves_keys_with_a_bias():
    model = biased_model()
    ids = torch.randint(0, 320, (1, 160))
    stock = logits(model, ids, None)
    error = {
        preset: float((logits(model, ids, preset) - stock).square().mean())
        for preset in ("k8v4", "kh8v4", "v-hadamard-mixed")
    }
    assert error["kh8v4"] < error["k8v4"] / 3
    assert error["v-hadamard-mixed"] < error["kh8v4"]  # K is not touched at all


def calibrated(model: Any, name: str, folder: Path, without_bias: bool) -> str:
    shape = attention_shape(model)
    biases = key_biases(model, shape) if without_bias else {}
    windows = torch.randint(0, 320, (8, 64), generator=torch.Generator().manual_seed(1)).tolist()
    moments = collect(model, shape, ["k", "v", "q"], windows, key_biases=biases)
    config = preset_config(name, "org/Biased", None, shape, without_bias)
    config = config.model_copy(update={"v": FORMATS["raw"].v})  # what K costs is the question
    save_preset(folder, config, fit_bases(moments.only(wanted(config)), config), "")
    return str(folder)


@pytest.mark.parametrize("name", ["k5v4", "k5.5v4"])
def test_a_calibrated_preset_stores_k_without_its_bias(name, tmp_path):
    model = biased_model()
    ids = torch.randint(0, 320, (1, 160))
    stock = logits(model, ids, None)
    error, loss = {}, {}
    for without in (False, True):
        preset = calibrated(model, name, tmp_path / str(without), without)
        error[without] = float((logits(model, ids, preset) - stock).square().mean())
        change = target_logprobs(model, ids.tolist(), load_preset(preset), range(2))
        loss[without] = abs(change - target_logprobs(model, ids.tolist())).mean()
    assert error[True] < 0.6 * error[False]
    assert loss[True] < 0.7 * loss[False]  # the strict measure sees it too


def test_the_bias_is_part_of_what_pages_mean(tmp_path):
    model = biased_model()
    streams = [
        load_preset(calibrated(model, "k4v4", tmp_path / str(without), without)).streams(32)[0]
        for without in (False, True)
    ]
    assert streams[0].basis != streams[1].basis and "without bias" in streams[1].basis


def test_a_small_bias_or_none_is_left_in():
    model = biased_model()
    shape = attention_shape(model)
    assert sorted(key_biases(model, shape)) == [0, 1]
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data *= LEAST / 401
    assert key_biases(model, shape) == {}
    plain = LlamaForCausalLM(LlamaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=32))
    assert key_biases(plain, attention_shape(plain)) == {}


@pytest.mark.parametrize("broken", ["missing", "shape", "nan"])
def test_a_damaged_bias_is_refused(broken, tmp_path):
    folder = Path(calibrated(biased_model(), "k4v4", tmp_path / "preset", True))
    tensors = load_file(folder / "basis.safetensors")
    if broken == "missing":
        del tensors["k_bias"]
    elif broken == "shape":
        tensors["k_bias"] = tensors["k_bias"][:, :1].contiguous()
    else:
        tensors["k_frequencies"][3] = float("nan")
    save_file(tensors, folder / "basis.safetensors")
    with pytest.raises(PresetInvalid, match=r"k_bias|k_frequencies"):
        load_preset(folder)
