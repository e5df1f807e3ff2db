"""A served model whose K has a large bias: stored without it, 8 bits of K answer like stock."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import GREEDY, assert_same_tokens, run
from mixes import VOCABULARY, prompts

from vllm_kvpca.calibration.collect import attention_shape
from vllm_kvpca.calibration.key_bias import as_tensors, key_biases
from vllm_kvpca.calibration.network import samples_of
from vllm_kvpca.preset import FORMATS, save_preset
from vllm_kvpca.preset.schema import ModelShape, PresetConfig

pytestmark = pytest.mark.e2e

LENGTHS = [300, 700, 1100]
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 64, 2


@pytest.fixture(scope="module")
def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=4096,
        initializer_range=0.1,
        rope_theta=1e6,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config).half().eval()
    for layer in model.model.layers:
        bias = layer.self_attn.k_proj.bias.data.zero_().view(KV_HEADS, HEAD_DIM)
        bias[:, 29:32], bias[:, 61:64] = 150, -80
    return model


def preset(folder: Path, model, without_bias: bool) -> str:
    """K in 8 bits, one scale for all of a token; V raw."""
    shape = attention_shape(model)
    k = FORMATS["k8v8"].k.model_copy(update={"basis": "pca", "without_bias": without_bias})
    size = ModelShape(
        name="org/Biased", num_layers=LAYERS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM
    )
    config = PresetConfig(format="k8", k=k, v=FORMATS["raw"].v, model=size)
    bases = {"k": torch.eye(HEAD_DIM).expand(LAYERS, KV_HEADS, -1, -1)}
    if without_bias:
        bases |= as_tensors(key_biases(model, shape))
    save_preset(folder, config, bases, "", weights=samples_of(model, shape))
    return str(folder)


def test_answers_are_those_of_stock(model, tmp_path):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    rounds = [{"prompts": prompts(LENGTHS), "sampling": {**GREEDY, "max_tokens": 8}}] * 2
    settings = {"model": str(folder), "skip_tokenizer_init": True, "max_model_len": 2048}
    stock = run(rounds[:1], None, **settings)["rounds"][0]
    same = {}
    for without in (True, False):
        options = {"preset": preset(tmp_path / str(without), model, without)}
        result = run(rounds, {**options, "compress_after": 256, "keep_recent": 32}, **settings)
        assert result["metrics"]["kvpca_archived_tokens_total"] > sum(LENGTHS) // 2
        if without:
            for answers in result["rounds"]:  # the second through the prefix cache
                assert_same_tokens(stock, answers)
        same[without] = sum(
            a["tokens"] == b["tokens"] for a, b in zip(stock, result["rounds"][0], strict=True)
        )
    assert same[False] < same[True]  # with the bias in K, 8 bits are too few
