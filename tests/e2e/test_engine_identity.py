"""Greedy answers of a real model: raw storage against stock vLLM, and what must not change."""

from __future__ import annotations

import pytest
from engines import GREEDY, archived_tokens, assert_same_tokens, run, text_prompts

pytestmark = pytest.mark.e2e

LENGTHS = [100, 245, 300, 700, 1500]
"""Below, across and far above compress_after = 256; chunks of 512."""
RAW = {"preset": "raw", "compress_after": 256, "keep_recent": 128}
SHORT = slice(0, 3)


def greedy(prompts, max_tokens=24, **more):
    return {"prompts": prompts, "sampling": {**GREEDY, "max_tokens": max_tokens}, **more}


@pytest.fixture(scope="module")
def prompts():
    return text_prompts(LENGTHS)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A LoRA adapter with random weights on all attention projections."""
    import torch
    from engines import model
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model())
    config = LoraConfig(
        r=8,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def stock(prompts, adapter):
    rounds = [greedy(prompts), greedy(prompts[3:5], lora=adapter)]
    return run(rounds, None, enable_lora=True)


@pytest.fixture(scope="module")
def raw(prompts, adapter):
    rounds = [greedy(prompts), greedy(prompts), greedy(prompts[3:5], lora=adapter)]
    return run(rounds, RAW, enable_lora=True)


def test_raw_storage_answers_like_stock(stock, raw):
    assert_same_tokens(stock["rounds"][0], raw["rounds"][0])
    # The first round archives all of it, the second finds it, the adapter's keys are others.
    wanted = archived_tokens(raw, LENGTHS, 24, RAW) + archived_tokens(raw, LENGTHS[3:5], 24, RAW)
    assert raw["metrics"]["kvpca_archived_tokens_total"] >= wanted > 2000


def test_a_second_request_reuses_archive_and_recent_tokens(raw):
    """Long prompts hit through both groups; the answers stay the same."""
    first, second = raw["rounds"][:2]
    for length, answer in zip(LENGTHS, second, strict=True):
        assert length - 64 <= answer["cached"] < length
    assert_same_tokens(first, second)


def test_lora_adapters_still_work(stock, raw):
    plain, adapted = stock["rounds"][0][3], stock["rounds"][1][0]
    assert plain["tokens"] != adapted["tokens"], "the adapter must matter"
    assert_same_tokens(stock["rounds"][1], raw["rounds"][2])


def test_all_blocks_come_back(raw):
    assert raw["free_blocks"] == raw["usable_blocks"]
    assert raw["metrics"]["kvpca_kv_cache_bytes/raw"] == 0
    assert raw["metrics"]["kvpca_kv_cache_bytes/archived"] == 0


def test_short_sequences_stay_raw(prompts, stock):
    """Up to compress_after nothing is archived, whatever the preset."""
    preset = {"preset": "k8v4", "compress_after": 512, "keep_recent": 256}
    result = run([greedy(prompts[SHORT])], preset)
    assert_same_tokens(stock["rounds"][0][SHORT], result["rounds"][0])
    assert result["metrics"]["kvpca_archived_tokens_total"] == 0


def test_preempted_sequences_resume_with_the_same_answer():
    """Six sequences grow to 330 tokens in a pool of 1,400: some must give way and come back."""
    rounds = [greedy(text_prompts([150] * 6), max_tokens=180)]
    room = run(rounds, RAW, max_model_len=1024)
    [raw_block] = [size for kind, _, size in room["groups"] if kind == "RecentSpec"]
    blocks = 1400 // raw_block
    tight = run(rounds, RAW, max_model_len=1024, num_gpu_blocks_override=blocks)
    assert (room["preemptions"], tight["usable_blocks"]) == (0, blocks - 1)
    assert tight["preemptions"] > 0
    archived = [r["metrics"]["kvpca_archived_tokens_total"] for r in (room, tight)]
    assert 0 < archived[0] <= archived[1]
    assert_same_tokens(room["rounds"][0], tight["rounds"][0])
    assert tight["free_blocks"] == tight["usable_blocks"]
