"""Tiny models with random weights whose layers are of several kinds, and prompts for them."""

from __future__ import annotations

import random
from pathlib import Path

import torch

HEAD_DIM, HEADS, KV_HEADS, VOCABULARY, WINDOW = 32, 4, 2, 512, 100


def full_and_sliding(folder: Path, full: int, sliding: int) -> str:
    """A Llama of which every so many layers are full attention, the others sliding windows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers = full + sliding
    kinds = ["sliding_attention"] * layers
    for number in range(full):
        kinds[number * layers // full] = "full_attention"
    torch.manual_seed(full * 100 + sliding)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=256,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=4096,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).half()
    config.layer_types, config.sliding_window = kinds, WINDOW
    model.save_pretrained(folder)
    return str(folder)


def prompts(lengths: list[int]) -> list[list[int]]:
    """Random token ids; no two prompts begin alike."""
    rng = random.Random(0)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
