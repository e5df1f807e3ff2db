"""Tiny models with random weights: nothing is downloaded."""

from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

SIZES = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # logits far enough apart for greedy answers to be stable
    "pad_token_id": 2,
    "eos_token_id": None,
}


@pytest.fixture(scope="session")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


@pytest.fixture(scope="session")
def sliding_model() -> Any:
    """Two layers with a window of 16 tokens, one with full attention."""
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**SIZES, sliding_window=16, layer_types=kinds)
    return Gemma3ForCausalLM(config).eval()
