"""The evaluation commands on the demo model, with real engines."""

import os
import subprocess
import sys

import pytest

from vllm_kvpca.demo_models.catalogue import ModelName
from vllm_kvpca.demo_models.folder import ensure
from vllm_kvpca.lab.record import load_all

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def model():
    return str(ensure(ModelName.smollm2))


def evaluate(*arguments):
    command = [sys.executable, "-m", "vllm_kvpca.cli.main", "evaluate", *arguments]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_quality_counts_what_was_archived(model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"The number {n} comes before {n + 1}. " for n in range(400)))
    common = ["--model", model, "--text", str(text), "--tokens", "1024", "--window", "512"]
    chosen = ["--chunk", "32", "--dtype", "float16", "--kv-gib", "0.5", "--thresholds", "0:0"]
    output = ["--preset", "k8v4", "--output", str(tmp_path / "records")]
    evaluate("quality", *common, *chosen, *output)
    [record] = load_all(tmp_path / "records", "quality")
    results = record.results
    assert results["predicted_tokens"] == 2 * 511
    assert results["dtype"] == "float16"
    assert 0.5 < results["archived_share_of_attended_keys"] < 1
    # An int4 V costs something; a broken archive costs everything.
    assert 1e-6 < results["kl_lower_bound_mean_nats"] < 0.1
    assert abs(results["perplexity_change"]) < 0.1
    # The same through transformers: the same tokens are archived, so both lose alike, but for
    # rounding: the engine's float16 logits come in steps of 1/64, which is 0.0003 in a mean over
    # 1,022 tokens, and adds a KL of about 2e-5 (a 64th of what bfloat16 adds in the records).
    elsewhere = ["--through", "transformers", "--dtype", "float32"]
    evaluate("quality", *common, *chosen, *output, *elsewhere)
    [other] = load_all(tmp_path / "records", "quality-transformers")
    theirs = other.results
    for name in ("boundary_step_tokens", "predicted_tokens", "archived_share_of_attended_keys"):
        assert theirs[name] == results[name]
    assert abs(theirs["perplexity_change"] - results["perplexity_change"]) < 0.001
    bounds = [r["kl_lower_bound_mean_nats"] for r in (results, theirs)]
    assert abs(bounds[0] - bounds[1]) < 2e-5 + 0.2 * bounds[1]
    assert theirs["kl_lower_bound_mean_nats"] < theirs["kl_mean_nats"]


def test_block_life_ends_with_an_empty_pool(model, tmp_path):
    lengths = ["--prompt-tokens", "700", "--generated", "20", "--max-model-len", "1024"]
    chosen = ["--preset", "k8v4", "--compress-after", "256", "--keep-recent", "64"]
    evaluate("block-life", "--model", model, *lengths, *chosen, "--output", str(tmp_path))
    [record] = load_all(tmp_path)
    results = record.results
    life = results["preset"]
    assert results["blocks_left_after_end"] == 0
    # The last token is never computed, and the one before it in the step that ends the request.
    assert life["computed_tokens"][-2] == 718
    assert life["archive_blocks"][1] == 0  # 256 tokens: not above compress_after
    assert life["archive_blocks"][-2] > 0
    assert results["final_mib"] < results["final_mib_stock"]
    # A raw block: its tokens, K and V of 64 two-byte numbers, 3 heads, 30 layers.
    assert life["block_bytes"] == life["group_block_tokens"][0] * 2 * 64 * 2 * 3 * 30
