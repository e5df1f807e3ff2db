"""`vllm_kvpca.kv_metrics(llm)`: figures of an LLM, its engine in this process or in its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from engines import model, text_prompts

from vllm_kvpca import kv_metrics
from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.metrics import METRICS

from .server import POLICY

SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
from vllm_kvpca import kv_metrics

if __name__ == "__main__":
    job = json.load(sys.stdin)
    llm = LLM(disable_log_stats=False, **job["llm"])
    before = kv_metrics(llm)
    llm.generate(
        [{"prompt_token_ids": job["prompt"]}],
        SamplingParams(temperature=0, max_tokens=16, ignore_eos=True),
        use_tqdm=False,
    )
    with open(job["result"], "w") as file:
        json.dump([before, kv_metrics(llm)], file)
"""
LENGTH = 700


@pytest.mark.e2e
@pytest.mark.parametrize("own_process", [False, True], ids=["in process", "own process"])
def test_the_figures_of_an_llm(tmp_path, own_process):
    script, result = tmp_path / "script.py", tmp_path / "figures.json"
    script.write_text(SCRIPT)
    options = {
        "preset": "k8v4",
        "compress_after": POLICY.compress_after,
        "keep_recent": POLICY.keep_recent,
    }
    llm = {
        "model": model(),
        "dtype": "float16",
        "max_model_len": 4096,
        "enforce_eager": True,
        "additional_config": {"kv_compression": options},
    }
    job = {"llm": llm, "prompt": text_prompts([LENGTH])[0], "result": str(result)}
    process = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(own_process)),
        },
    )
    assert process.returncode == 0, process.stderr[-4000:]
    before, after = json.loads(result.read_text())
    shown = {metric.key for metric in METRICS} - {"preset_info"}
    assert set(before) == set(after) == shown
    assert before["archived_tokens"] == 0
    assert before["kv_cache_bytes"]["free"] == after["kv_cache_bytes"]["free"] > 0
    # The last of the 16 tokens is answered and never computed.
    archived = POLICY.boundary(LENGTH + 15)
    assert after["archived_tokens"] == archived
    assert after["request_archived_tokens"] == {"count": 1, "sum": archived}
    capacity = after["kv_cache_capacity_tokens"] / after["kv_cache_capacity_raw_tokens"]
    assert 1.5 < capacity < 2.6


def test_an_engine_that_does_not_compress_is_refused():
    config = SimpleNamespace(additional_config={})
    llm = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=object(), vllm_config=config))
    with pytest.raises(UnsupportedError, match="this engine does not compress"):
        kv_metrics(llm)


def test_what_is_no_llm_is_refused():
    with pytest.raises(UnsupportedError, match=r"takes a vllm\.LLM, not dict"):
        kv_metrics({})
