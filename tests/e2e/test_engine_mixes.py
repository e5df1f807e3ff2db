"""Layers of other kinds beside compressed ones: raw storage answers like stock vLLM, also when
the same prompt is asked again."""

from __future__ import annotations

from typing import Any

import pytest
from engines import GREEDY, assert_same_tokens, run
from mixes import (
    chunked_local,
    full_and_sliding,
    linear_attention,
    mamba2,
    prompts,
    short_convolutions,
    two_head_shapes,
)

pytestmark = pytest.mark.e2e

LENGTHS = [90, 300, 700, 1100]
RAW = {"preset": "raw", "compress_after": 256, "keep_recent": 128}


def ask(model: str, preset, rounds: int, **llm):
    """Answers of one engine; every round asks the same prompts."""
    rounds = [{"prompts": prompts(LENGTHS), "sampling": {**GREEDY, "max_tokens": 12}}] * rounds
    arguments = {"model": model, "skip_tokenizer_init": True, "max_model_len": 2048, **llm}
    return run(rounds, preset, **arguments)


def assert_like_stock(stock: dict[str, Any], result: dict[str, Any]) -> None:
    """The same tokens in every round, hits as long up to a raw block, and all blocks are back."""
    for wanted, got in zip(stock["rounds"], result["rounds"], strict=True):
        assert_same_tokens(wanted, got)
    raw_block = max(size for kind, _, size in result["groups"] if kind == "RecentSpec")
    again = zip(LENGTHS, stock["rounds"][1], result["rounds"][1], strict=True)
    for length, before, answer in again:
        assert before["cached"] - raw_block < answer["cached"] < length
    assert result["free_blocks"] == result["usable_blocks"]


def layers_told(result: dict[str, Any]) -> str:
    """What the one line of the log says of the layers."""
    (line,) = [line for line in result["log"].splitlines() if "KV compression: preset" in line]
    return line.partition("layers: ")[2].partition(";")[0]


@pytest.mark.parametrize(
    ("full", "sliding"), [(3, 2), pytest.param(9, 6, marks=pytest.mark.each_vllm)]
)
def test_full_and_sliding_layers(tmp_path, full, sliding):
    """vLLM splits a kind of layers into groups once it has 1.5 times as many as another."""
    model = full_and_sliding(tmp_path / "model", full, sliding)
    result = ask(model, RAW, 2)
    assert_like_stock(ask(model, None, 2), result)
    kinds = [kind for kind, _, _ in result["groups"]]
    assert kinds.count("RecentSpec") == kinds.count("ArchiveSpec") > 1
    assert layers_told(result) == (
        f"{full} compressed full attention, {sliding} left to vLLM: SlidingWindow"
    )


SMALLEST = 40
"""Blocks in which a request of 1,120 tokens can always go on, with 12 full and 4 sliding layers: of
each of three pairs 4 raw and 7 archived ones, 6 of the sliding window, and the null block."""


def test_a_small_pool_serves_or_is_refused(tmp_path):
    """Requests that do not fit together wait or are preempted, as in stock."""
    model = full_and_sliding(tmp_path / "model", 12, 4)
    arguments = {"model": model, "skip_tokenizer_init": True, "max_model_len": 1120}
    growing = prompts([120] * 10)
    rounds = [
        {"prompts": prompts(LENGTHS), "sampling": {**GREEDY, "max_tokens": 12}},
        {"prompts": growing, "sampling": {**GREEDY, "max_tokens": 24}},
    ]
    too_few = f"--num-gpu-blocks-override {SMALLEST - 1} leaves {SMALLEST - 2} KV cache blocks"
    with pytest.raises(AssertionError, match=too_few):
        run(rounds, RAW, num_gpu_blocks_override=SMALLEST - 1, **arguments)
    stock = run(rounds, None, num_gpu_blocks_override=SMALLEST, **arguments)
    result = run(rounds, RAW, num_gpu_blocks_override=SMALLEST, **arguments)
    assert result["usable_blocks"] == SMALLEST - 1
    for wanted, got in zip(stock["rounds"], result["rounds"], strict=True):
        assert_same_tokens(wanted, got)
    assert result["preemptions"] > 0 < stock["preemptions"]
    assert result["free_blocks"] == result["usable_blocks"]


NO_HITS = {"enable_prefix_caching": False}
OWN_KINDS = {
    "chunked local attention": (chunked_local, 2, 3, "ChunkedLocalAttention", {}),
    "short convolutions": (short_convolutions, 2, 3, "Mamba", {}),
    "Mamba 2": (mamba2, 3, 3, "Mamba", NO_HITS),
    "linear attention": (linear_attention, 2, 2, "Mamba", {"dtype": "bfloat16"}),
}
"""Models, how many of their layers are compressed and left to vLLM, as which kind, and what vLLM's
CPU build can do: Mamba 2 without prefix caching only, linear attention in bfloat16 only. It has
neither Mamba 1 nor lightning attention."""
NEWEST = {"chunked local attention", "linear attention"}
"""Those that run with every tested vLLM."""


@pytest.mark.parametrize(
    "kind",
    [pytest.param(k, marks=[pytest.mark.each_vllm] if k in NEWEST else []) for k in OWN_KINDS],
)
def test_layers_of_other_kinds(tmp_path, kind):
    """One request at a time: some of vLLM's own layers answer otherwise in other batches."""
    build, full, others, name, options = OWN_KINDS[kind]
    model = build(tmp_path / "model")
    stock = ask(model, None, 2, max_num_seqs=1, **options)
    result = ask(model, RAW, 2, max_num_seqs=1, **options)
    assert_like_stock(stock, result)
    assert (stock["rounds"][1][-1]["cached"] == 1024) == (options != NO_HITS)
    assert layers_told(result) == f"{full} compressed full attention, {others} left to vLLM: {name}"


def test_hits_beside_states_are_as_long_as_stock_s(tmp_path):
    """Whatever the size of archive blocks: states are kept every 256 tokens."""
    model = linear_attention(tmp_path / "model")
    result = ask(model, {**RAW, "preset": "k8v4"}, 2, max_num_seqs=1, dtype="bfloat16")
    sizes = {kind: size for kind, _, size in result["groups"]}
    assert sizes == {"MambaSpec": 256, "RecentSpec": 256, "ArchiveSpec": 616}
    first, second = result["rounds"]
    assert_same_tokens(first, second)
    assert [answer["cached"] for answer in second] == [0, 256, 512, 1024]


@pytest.mark.each_vllm
def test_heads_of_two_shapes(tmp_path):
    """Pages of layers with fewer heads get larger blocks: two pairs with other block sizes."""
    model = two_head_shapes(tmp_path / "model", [2, 4, 2, 4, 4, 2])
    stock = ask(model, None, 2, trust_remote_code=True)["rounds"]
    for preset in (RAW, {**RAW, "preset": "k8v8"}):
        result = ask(model, preset, 2, trust_remote_code=True)
        assert len({size for kind, _, size in result["groups"] if kind == "RecentSpec"}) == 2
        if preset is RAW:
            assert_same_tokens(stock[0], result["rounds"][0])
        assert_same_tokens(result["rounds"][0], result["rounds"][1])
        block = max(size for kind, _, size in result["groups"] if kind == "RecentSpec")
        for length, answer in zip(LENGTHS, result["rounds"][1], strict=True):
            assert length - 1 - block < answer["cached"] < length
        assert result["free_blocks"] == result["usable_blocks"]
