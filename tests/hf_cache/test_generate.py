"""What `model.generate` answers with a preset's cache, against transformers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from vllm_kvpca import load_preset_cache
from vllm_kvpca.demo_models.catalogue import ModelName
from vllm_kvpca.demo_models.folder import ensure

ARCHIVING = {"compress_after": 40, "keep_recent": 8}


def prompts(batch: int, tokens: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 320, (batch, tokens), generator=generator)


def padded(lengths: list[int]) -> dict[str, torch.Tensor]:
    """A batch with padding on the left, as tokenizers make it for generation."""
    ids = prompts(len(lengths), max(lengths))
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : max(lengths) - length] = 2
        mask[row, : max(lengths) - length] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: Any, inputs: dict[str, torch.Tensor], cache: Any, **options: Any) -> list:
    torch.manual_seed(0)
    new = {"max_new_tokens": 50, "do_sample": False} | options
    return model.generate(**inputs, past_key_values=cache, **new).tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}],
    ids=["greedy", "beams", "sampling"],
)
@pytest.mark.parametrize("adaptive", [True, False])
def test_raw_gives_the_tokens_of_dynamic_cache(model, options, adaptive):
    inputs = padded([60, 20, 43])
    cache = load_preset_cache("raw", num_layers=3, device="cpu", adaptive=adaptive, **ARCHIVING)
    stock = answer(model, inputs, DynamicCache(), **options)
    assert answer(model, inputs, cache, **options) == stock
    assert cache.get_seq_length() == 60 + 50 - 1
    assert cache.get_memory_stats()["archived_tokens"] == (96 if adaptive else 109)


def test_a_second_turn_continues_the_cache(model):
    turns = prompts(1, 45), prompts(1, 30, seed=2)
    caches = DynamicCache(), load_preset_cache("raw", 3, **ARCHIVING)
    answers = []
    for cache in caches:
        ids = torch.tensor(answer(model, {"input_ids": turns[0]}, cache))
        answers.append(answer(model, {"input_ids": torch.cat([ids, turns[1]], 1)}, cache))
    assert answers[0] == answers[1]


def test_padding_changes_no_answer(model):
    """Every token is archived by itself, so a padded row is what the prompt alone is."""
    inputs = padded([60, 20])
    together = answer(model, inputs, load_preset_cache("k8v8", 3, adaptive=False))
    alone = {"input_ids": inputs["input_ids"][1:, 40:]}
    cache = load_preset_cache("k8v8", 3, adaptive=False)
    assert together[1][40:] == answer(model, alone, cache)[0]


def test_layers_with_sliding_windows_stay_with_transformers(sliding_model):
    config = sliding_model.config
    inputs = {"input_ids": prompts(2, 60)}
    cache = load_preset_cache("raw", config=config, **ARCHIVING)
    stock = answer(sliding_model, inputs, DynamicCache(config=config))
    assert answer(sliding_model, inputs, cache) == stock
    assert cache.is_sliding == [True, False, True]
    stats = cache.get_memory_stats()
    assert (stats["compressed_layers"], stats["other_layers"]) == (1, 2)
    assert stats["archived_tokens"] == 96
    # Without the config all layers are taken for full attention: more memory, same tokens.
    assert answer(sliding_model, inputs, load_preset_cache("raw", 3, **ARCHIVING)) == stock


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, torch.Tensor]:
    folder = ensure(ModelName.smollm2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = " ".join(f"{i} bottles of beer on the wall, then {i * 7 % 60}." for i in range(60))
    ids = tokenizer(text, return_tensors="pt").input_ids
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), ids


@pytest.mark.e2e
def test_smollm2_raw_gives_the_tokens_of_dynamic_cache(smollm2):
    model, ids = smollm2
    inputs = {"input_ids": ids[:, :300]}
    cache = load_preset_cache(
        preset_path="raw", num_layers=30, device="cpu", compress_after=200, keep_recent=64
    )
    new = {"max_new_tokens": 24}
    assert answer(model, inputs, cache, **new) == answer(model, inputs, DynamicCache(), **new)
    assert cache.get_memory_stats()["archived_tokens"] == 256


@pytest.mark.e2e
@torch.no_grad()
def test_smollm2_k8v4_is_close(smollm2):
    """512 archived tokens, 64 predicted. The server's record says 0.0011 nats in the mean."""
    model, ids = smollm2
    logits = {}
    for name in ("raw", "k8v4"):
        cache = load_preset_cache(name, config=model.config, adaptive=False)
        model(ids[:, :512], past_key_values=cache)
        logits[name] = model(ids[:, 512:576], past_key_values=cache).logits.log_softmax(-1)
    kl = (logits["raw"].exp() * (logits["raw"] - logits["k8v4"])).sum(-1).mean()
    assert 1e-6 < kl < 0.01
    stats = cache.get_memory_stats()
    assert stats["archived_tokens"] == 576 and stats["raw_bytes"] == 0
    assert stats["total_ratio"] == pytest.approx(512 / 100)  # float32: twice that of 16 bits
