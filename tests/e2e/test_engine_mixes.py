"""Layers of other kinds beside compressed ones: raw storage answers like stock vLLM, also when
the same prompt is asked again."""

from __future__ import annotations

import pytest
from engines import GREEDY, assert_same_tokens, run
from mixes import full_and_sliding, prompts, two_head_shapes

pytestmark = pytest.mark.e2e

LENGTHS = [90, 300, 700, 1100]
RAW = {"preset": "raw", "compress_after": 256, "keep_recent": 128}


def ask(model: str, preset, rounds: int, **llm):
    """Answers of one engine; every round asks the same prompts."""
    rounds = [{"prompts": prompts(LENGTHS), "sampling": {**GREEDY, "max_tokens": 12}}] * rounds
    arguments = {"model": model, "skip_tokenizer_init": True, "max_model_len": 2048, **llm}
    return run(rounds, preset, **arguments)


@pytest.mark.parametrize(("full", "sliding"), [(3, 2), (9, 6), (12, 4)])
def test_full_and_sliding_layers(tmp_path, full, sliding):
    """vLLM splits a kind of layers into groups once it has 1.5 times as many as another."""
    model = full_and_sliding(tmp_path / "model", full, sliding)
    stock = ask(model, None, 2)["rounds"]
    result = ask(model, RAW, 2)
    for wanted, got in zip(stock, result["rounds"], strict=True):
        assert_same_tokens(wanted, got)
    kinds = [kind for kind, _, _ in result["groups"]]
    assert kinds.count("RecentSpec") == kinds.count("ArchiveSpec") > 1
    for length, before, answer in zip(LENGTHS, stock[1], result["rounds"][1], strict=True):
        assert answer["cached"] >= before["cached"] - 128, length
    assert result["free_blocks"] == result["usable_blocks"]
    assert result["log"].count("compressed full attention") == 1
    assert f"{full} compressed full attention, {sliding} left to vLLM" in result["log"]


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
