"""From what engines return to the results of a record."""

import json

import numpy as np
import pytest

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import against_stock, teacher_forced, texts
from vllm_kvpca.lab.measurements import (
    block_life,
    capacity,
    chat,
    divergence,
    identity,
    quality,
    throughput,
)
from vllm_kvpca.lab.measurements.identity import Answer


def test_identity_finds_the_first_difference_and_its_gap():
    stock = [Answer([1, 2, 3], [0.5, 0.25, 1]), Answer([4, 5, 6], [1, 1, 1])]
    other = [Answer([1, 9, 3], [0, 0, 0]), Answer([4, 5, 6], [0, 0, 0])]
    results = identity.compare(stock, other, [100, 300])
    assert results["identical_prompts"] == 1
    assert results["largest_gap_nats"] == 0.25
    assert [row["identical_tokens"] for row in results["prompts"]] == [1, 3]
    assert results["prompts"][1]["stock_logprob_gap_nats"] is None


def test_identity_of_equal_answers_has_no_gap():
    same = [Answer([1], [0.0])]
    assert identity.compare(same, same, [5])["largest_gap_nats"] is None


def test_divergence_is_a_distribution_of_lengths():
    stock = [Answer([1, 2, 3, 4], [0.5, 0.25, 1, 1]) for _ in range(4)]
    others = [[1, 9, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4], [1, 2, 3, 9]]
    results = divergence.compare(stock, [Answer(x, [0] * 4) for x in others], [7, 8, 9, 10])
    assert [row["same_tokens"] for row in results["prompts"]] == [1, 4, 0, 3]
    assert [row["gap_nats"] for row in results["prompts"]] == [0.25, None, 0.5, 1]
    assert results["prompts"][3]["prompt_tokens"] == 10
    assert results["same_tokens_quartiles"] == [0.75, 2, 3.25]
    assert results["never_parted"] == 0.25
    assert (results["gap_median_nats"], results["gap_largest_nats"]) == (0.5, 1)
    same = divergence.compare(stock, stock, [7] * 4)
    assert same["never_parted"] == 1 and same["gap_median_nats"] is None


def scores(rng, share):
    logits = rng.normal(0, 3, (3, 7, quality.RETURNED))
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    order = np.argsort(-logits, axis=-1)
    return quality.Scores(
        target=logits[..., 0],
        ids=order,
        logprobs=np.take_along_axis(logits, order, -1),
        share=share,
        align=64,
        dtype="float16",
    )


def test_quality_of_an_engine_against_itself_is_perfect():
    own = scores(np.random.default_rng(0), 0.9)
    results = quality.compare(own, own, seed=0)
    assert results["perplexity_change"] == 0
    assert results["perplexity_change_ci95"] == [0, 0]
    assert results["kl_lower_bound_mean_nats"] == pytest.approx(0, abs=1e-9)
    assert results["top1_agreement"] == 1
    assert results["predicted_tokens"] == 21
    json.dumps(results, allow_nan=False)


def test_quality_sees_a_difference():
    rng = np.random.default_rng(0)
    results = quality.compare(scores(rng, 0), scores(rng, 0.9), seed=0)
    assert results["kl_lower_bound_mean_nats"] > 0.1
    assert results["top1_agreement"] < 0.5
    assert results["archived_share_of_attended_keys"] == 0.9


def test_quality_settings_move_all_windows_together():
    settings = teacher_forced.settings_for("m", [[0] * 100] * 5, 16, "k8v4", (0, 0))
    assert settings.max_num_seqs == 5
    assert settings.max_num_batched_tokens == 80
    assert settings.chunk == 16


def test_speeds_are_medians():
    times = [(2.0, 4.0), (1.0, 2.0), (4.0, 8.0)]
    speeds = throughput.speeds(times, requests=4, length=10, generated=5)
    assert speeds["prompt_tokens_per_second"] == 20
    assert speeds["decode_tokens_per_second"] == 4
    results = throughput.compare(speeds, throughput.speeds(times[:1] * 3, 4, 10, 5) | {"x": 0})
    assert results["prompt_ratio"] == 1
    slow = throughput.speeds([(4.0, 16.0)], 4, 10, 5)
    assert throughput.compare(speeds, slow)["prompt_ratio"] == 0.5
    assert throughput.compare(speeds, slow)["decode_ratio"] == 0.25


def test_random_prompts_are_repeatable():
    prompts = texts.random_prompts(50, 3, 20, seed=1)
    assert prompts == texts.random_prompts(50, 3, 20, seed=1)
    assert [len(prompt) for prompt in prompts] == [20] * 3
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)


def test_capacity_ratio():
    assert capacity.compare({"tokens": 100}, {"tokens": 250})["ratio"] == 2.5


def test_chat_reuse_is_a_share_of_all_prompt_tokens():
    stock = {"prompts": [100, 300], "reused": [0, 200]}
    results = chat.compare(stock, {"prompts": [100, 300], "reused": [0, 180]})
    assert (results["reused_stock"], results["reused"]) == (0.5, 0.45)


def test_block_life_in_mib():
    life = {"raw_blocks": [1, 3, 0], "archive_blocks": [0, 2, 0], "block_bytes": 1 << 20}
    assert block_life.mib(life) == [1, 5, 0]
    assert block_life.mib(life, "archive") == [0, 2, 0]
    results = block_life.compare(life | {"raw_blocks": [2, 9, 0]}, life)
    assert (results["peak_mib"], results["final_mib"]) == (5, 5)
    assert results["peak_mib_stock"] == 11
    assert results["blocks_left_after_end"] == 0


def test_thresholds():
    assert against_stock.parse_thresholds("512:256") == (512, 256)
    for wrong in ("512", "a:b", "1:-1", ""):
        with pytest.raises(OptionsError, match="AFTER:RECENT"):
            against_stock.parse_thresholds(wrong)
