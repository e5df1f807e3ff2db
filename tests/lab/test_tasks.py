"""Handing over to lm-eval. A record in benchmarks/records shows a real run."""

import importlib.util

from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.lab.docs import tables
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.measurements import tasks


def test_without_lm_eval_the_way_out_is_said_before_anything_starts(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "lm_eval" else find(n))
    words = ["evaluate", "tasks", "--model", "nowhere", "--preset", "k8v4", "--tasks", "arc_easy"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert 'pip install ".[lab]" in a clone of vllm-kvpca' in result.stderr.replace("\n", " ")


def test_lm_eval_gets_the_engine_that_was_asked_for():
    common = {"model": "m", "max_model_len": 2048, "chunk": 64, "seed": 3}
    settings = EngineSettings(preset="k8v4", compress_after=0, keep_recent=0, **common)
    call = tasks.call(settings, tasks.Chosen(tasks=("a", "b"), limit=7))
    assert (call["model"], call["tasks"], call["limit"]) == ("vllm", ["a", "b"], 7)
    arguments = call["model_args"]
    assert arguments["pretrained"] == "m" and "model" not in arguments
    expected = {"preset": "k8v4", "compress_after": 0, "keep_recent": 0}
    assert arguments["additional_config"] == {"kv_compression": expected}
    # Of a prompt that one step computes whole, nothing would be read from the archive.
    assert arguments["long_prefill_token_threshold"] == 64
    assert arguments["enable_prefix_caching"] is False
    stock = tasks.call(EngineSettings(preset=STOCK, **common), tasks.Chosen(tasks=("a",)))
    assert "additional_config" not in stock["model_args"]


def found(accuracy):
    """As lm_eval.simple_evaluate returns it."""
    metrics = {"alias": "a", "acc,none": accuracy, "acc_stderr,none": 0.01, "words,x": 3}
    return {
        "results": {"a": metrics | {"words_stderr,x": "N/A"}},
        "versions": {"a": 1.0},
        "lm_eval": "0.4.13",
        "n-samples": {"a": {"original": 100, "effective": 50}},
    }


def test_every_metric_gets_a_row(make):
    results = tasks.compare(found(0.5), found(0.25))
    assert [(r["metric"], r["stock"], r["preset"], r["change"]) for r in results["rows"]] == [
        ("acc", 0.5, 0.25, -0.25),
        ("words", 3, 3, 0),
    ]
    assert [r["stderr"] for r in results["rows"]] == [0.01, None]
    assert results["rows"][0]["examples"] == 50
    text = tables.table("tasks", [make(kind="tasks", slug="t", results=results, num_fewshot=None)])
    assert "| a: acc | 0.5000 ± 0.0100 | 0.2500 ± 0.0100 | 50 |" in text
