"""A model with the K bias of Qwen2.5: why its presets rotate K."""

from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vllm_kvpca import load_preset_cache


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
