"""The bias that a model adds to K, read off a model of transformers."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvpca.calibration.collect import AttentionShape
from vllm_kvpca.codec.key_bias import KeyBias

LEAST = 10.0
"""A smaller bias is left in: K itself has values of a few units, and taking a bias out costs
decoding a sum per query and run (codec.key_bias)."""


def key_biases(model: Any, shape: AttentionShape) -> dict[int, KeyBias]:
    """What may be taken out of K of each full-attention layer; empty where it would not pay.

    Empty, too, where K is not the projection turned by plain RoPE, pair by pair over the whole
    head: keys that are normalized, partial or multimodal rotation.
    """
    base = model.base_model
    frequencies = getattr(getattr(base, "rotary_emb", None), "inv_freq", None)
    if frequencies is None or 2 * len(frequencies) != shape.head_dim:
        return {}
    scaling = float(getattr(base.rotary_emb, "attention_scaling", 1.0))
    found = {}
    for layer in shape.layers:
        attention = getattr(base.layers[layer], "self_attn", None)
        bias = getattr(getattr(attention, "k_proj", None), "bias", None)
        if bias is None or hasattr(attention, "k_norm"):
            return {}
        by_head = bias.detach().float().unflatten(0, (shape.num_kv_heads, shape.head_dim))
        found[layer] = KeyBias(by_head * scaling, frequencies.detach().float())
    largest = max(float(one.slow.abs().max()) for one in found.values())
    return found if largest >= LEAST else {}


def as_tensors(biases: dict[int, KeyBias]) -> dict[str, torch.Tensor]:
    """As a preset's basis file holds them (preset.basis_file): "k_bias" and "k_frequencies"."""
    layers = sorted(biases)
    return {
        "k_bias": torch.stack([biases[layer].bias for layer in layers]).cpu(),
        "k_frequencies": biases[layers[0]].frequencies.cpu(),
    }
