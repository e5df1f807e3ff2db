"""A served engine of each family of formats, with every tested version of vLLM.

The model goes on with a text that it has read many times, which leaves it no doubt: the archive's
rounding must not change a token, so stock vLLM is the reference of every format.
"""

from __future__ import annotations

import pytest
from engines import GREEDY, assert_same_tokens, model, run

pytestmark = pytest.mark.e2e

FAMILIES = {
    "bits moved, not changed": "raw",
    "int8 and rotated int4": "k8v4",
    "fitted bases, two bands": "HuggingFaceTB--SmolLM2-135M-Instruct/k5.5v5.5",
}
REPEATS = (4, 20, 40)
"""About 90 to 800 tokens: below, across and far above compress_after = 256."""


@pytest.fixture(scope="module")
def prompts():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model())
    sentence = " Anna lives in Oslo and walks to the harbour every morning to look at the {}."
    things = ("ships", "gulls", "ropes")
    texts = [sentence.format(thing) * n for thing, n in zip(things, REPEATS, strict=True)]
    return [tokenizer(text + " Anna lives in").input_ids for text in texts]


def twice(prompts):
    return [{"prompts": prompts, "sampling": {**GREEDY, "max_tokens": 16}}] * 2


@pytest.fixture(scope="module")
def stock(prompts):
    return run(twice(prompts), None)["rounds"][0]


@pytest.mark.parametrize("preset", FAMILIES.values(), ids=FAMILIES)
def test_answers_are_those_of_stock(prompts, stock, preset):
    """Cold and through the prefix cache; afterwards every block is back."""
    options = {"preset": preset, "compress_after": 256, "keep_recent": 128}
    result = run(twice(prompts), options)
    cold, again = result["rounds"]
    assert_same_tokens(stock, cold)
    assert_same_tokens(stock, again)
    lengths = [len(prompt) for prompt in prompts]
    assert all(answer["cached"] == 0 for answer in cold)
    assert lengths[-1] / 3 < again[-1]["cached"] < lengths[-1]
    metrics = result["metrics"]
    least = sum(length - 256 for length in lengths[1:])
    assert least < metrics["kvpca_archived_tokens_total"] <= 2 * sum(lengths) + 6 * 16
    assert metrics["kvpca_request_archived_tokens_count"] == 2 * len(prompts)
    assert result["free_blocks"] == result["usable_blocks"]
    assert metrics["kvpca_kv_cache_bytes/raw"] == metrics["kvpca_kv_cache_bytes/archived"] == 0
