"""Tiny models with random weights whose layers are of several kinds, and prompts for them."""

from __future__ import annotations

import json
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


def two_head_shapes(folder: Path, kv_heads: list[int]) -> str:
    """A model of full-attention layers with other numbers of KV heads, as Nemotron's are."""
    from safetensors.torch import save_file

    hidden, inner = HEADS * HEAD_DIM, 256
    torch.manual_seed(1)
    weights = {}

    def add(name: str, rows: int, columns: int) -> None:
        weights[f"{name}.weight"] = (0.1 * torch.randn(rows, columns)).half()

    add("model.embed_tokens", VOCABULARY, hidden)
    add("lm_head", VOCABULARY, hidden)
    for layer, heads in enumerate(kv_heads):
        prefix = f"model.layers.{layer}."
        for which, rows in (("q", hidden), ("k", heads * HEAD_DIM), ("v", heads * HEAD_DIM)):
            add(f"{prefix}self_attn.{which}_proj", rows, hidden)
        add(f"{prefix}self_attn.o_proj", hidden, hidden)
        for which in ("gate", "up"):
            add(f"{prefix}mlp.{which}_proj", inner, hidden)
        add(f"{prefix}mlp.down_proj", hidden, inner)
        for norm in ("input", "post_attention"):
            weights[f"{prefix}{norm}_layernorm.weight"] = torch.ones(hidden).half()
    weights["model.norm.weight"] = torch.ones(hidden).half()
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # ffn_mult 1: 2 / 3 of the hidden size, rounded up to 256.
    blocks = [
        {
            "attention": {
                "no_op": False,
                "replace_with_linear": False,
                "n_heads_in_group": HEADS // heads,
            },
            "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 1.0},
        }
        for heads in kv_heads
    ]
    config = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "auto_map": {"AutoConfig": "configuration_decilm.DeciLMConfig"},
        "block_configs": blocks,
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": len(kv_heads),
        "num_attention_heads": HEADS,
        "num_key_value_heads": max(kv_heads),
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_decilm.py").write_text(DECILM)
    return str(folder)


DECILM = """
from transformers import LlamaConfig


class Block(dict):
    def __getattr__(self, name):
        if name in self:
            return self[name]
        raise AttributeError(name)


class DeciLMConfig(LlamaConfig):
    model_type = "nemotron-nas"

    def __init__(self, block_configs=(), **values):
        super().__init__(**values)
        self.block_configs = [
            Block({part: Block(content) for part, content in block.items()})
            for block in block_configs
        ]
"""


def prompts(lengths: list[int]) -> list[list[int]]:
    """Random token ids; no two prompts begin alike."""
    rng = random.Random(0)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
