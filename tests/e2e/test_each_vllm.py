"""A served engine of each family of formats, with every tested version of vLLM.

The model goes on with a text that it has read many times, which leaves it no doubt: the archive's
rounding must not change a token, so stock vLLM is the reference of every format.
"""

from __future__ import annotations

import json
import urllib.request

import pytest
from engines import GREEDY, assert_same_tokens, model, run

from .server import API_KEY, NAME, POLICY, Server

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


def test_a_server_answers_counts_and_tells(server: Server):
    """`vllm serve`: the second of two equal requests hits the prefix cache and gets the same
    answer, and the figures arrive from the engine's process."""
    sentence = "Boris lives in Lima and walks to the harbour every morning to look at the ships. "
    prompt = sentence * 40 + "Boris lives in"
    with server.client() as client:
        answers = [
            client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0)
            for _ in range(2)
        ]
    assert "Lima" in answers[0].choices[0].text
    assert answers[0].choices[0].text == answers[1].choices[0].text
    cold, again = (answer.usage.prompt_tokens_details for answer in answers)
    assert (cold.cached_tokens if cold else 0) == 0 < again.cached_tokens
    scrape = server.wait_until_idle()
    archived = scrape.value("kvpca_archived_tokens_total")
    assert archived >= POLICY.boundary(answers[0].usage.prompt_tokens) > 0
    headers = {"Authorization": f"Bearer {API_KEY}"}
    request = urllib.request.Request(f"{server.url}/kv_compression", headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        [engine] = json.loads(answer.read())["engines"]
    assert engine["figures"]["archived_tokens"] == archived
