"""Tiny models with random weights whose layers are of several kinds, and prompts for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

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


COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 256,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}


def save(folder: Path, kind: type, config: Any) -> str:
    """A model with random weights."""
    torch.manual_seed(0)
    kind(config).half().save_pretrained(folder)
    return str(folder)


def chunked_local(folder: Path) -> str:
    """Two layers of full attention and three that see their chunk of 256 tokens, as in Llama 4."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    full = [False, False, True, False, True]
    config = Llama4TextConfig(
        **COMMON,
        num_hidden_layers=len(full),
        head_dim=HEAD_DIM,
        attention_chunk_size=256,
        intermediate_size_mlp=256,
        moe_layers=[],
        interleave_moe_layer_step=0,
        no_rope_layers=[int(not one) for one in full],
        layer_types=["full_attention" if one else "chunked_attention" for one in full],
    )
    return save(folder, Llama4ForCausalLM, config)


def short_convolutions(folder: Path) -> str:
    """Two layers of full attention and three short convolutions, as in LFM2."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    width = HEADS * HEAD_DIM
    config = Lfm2Config(
        **COMMON,
        num_hidden_layers=5,
        layer_types=["conv", "conv", "full_attention", "conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
        conv_dim=width,
        block_dim=width,
        block_multiple_of=32,
        block_ffn_dim_multiplier=1.0,
    )
    return save(folder, Lfm2ForCausalLM, config)


def mamba2(folder: Path) -> str:
    """Three layers that hold attention and Mamba 2 side by side, as in Falcon-H1."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    config = FalconH1Config(
        **COMMON,
        num_hidden_layers=3,
        head_dim=HEAD_DIM,
        mamba_d_ssm=256,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
    )
    return save(folder, FalconH1ForCausalLM, config)


def linear_attention(folder: Path) -> str:
    """Two layers of full and two of linear attention (gated delta rule), as in Qwen3-Next. A state
    of two heads is larger than 128 tokens of full attention: vLLM takes blocks of 256."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **{**COMMON, "num_key_value_heads": HEADS},
        num_hidden_layers=4,
        head_dim=64,
        layer_types=["linear_attention", "full_attention"] * 2,
        linear_num_value_heads=2,
        linear_num_key_heads=2,
        linear_key_head_dim=128,  # what vLLM's CPU build can do
        linear_value_head_dim=128,
        # vLLM wants one layer with experts.
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[0, 1, 2],
    )
    return save(folder, Qwen3NextForCausalLM, config)


def prompts(lengths: list[int]) -> list[list[int]]:
    """Random token ids; no two prompts begin alike."""
    rng = random.Random(0)
    return [[rng.randrange(VOCABULARY) for _ in range(length)] for length in lengths]
