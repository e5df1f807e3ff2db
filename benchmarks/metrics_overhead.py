"""What the metrics cost: time spent on them per decode step, measured inside a real engine.

    python benchmarks/metrics_overhead.py [SEQUENCES]

Times both halves, counting in the scheduler and publishing in the stat logger, while so many
sequences decode, and writes a record. On a CPU a step is slow, so look at the microseconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
PROMPT, DECODED = 400, 40


def timed(spent: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - started)

    return wrapper


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main(sequences: int) -> None:
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_kvpca.cli.demo_model import ModelName, ensure
    from vllm_kvpca.evaluation.record import make_record
    from vllm_kvpca.serving import cache_stats
    from vllm_kvpca.serving.stat_logger import KvpcaStatLogger

    counting: list[float] = []
    publishing: list[float] = []
    steps: list[float] = []
    cache_stats.take_stats = timed(counting, cache_stats.take_stats)
    KvpcaStatLogger.record = timed(publishing, KvpcaStatLogger.record)  # type: ignore[method-assign]
    LLMEngine.step = timed(steps, LLMEngine.step)  # type: ignore[method-assign]
    model = str(ensure(ModelName.smollm2))
    llm = LLM(
        model,
        max_model_len=2048,
        max_num_seqs=sequences,
        enforce_eager=True,
        disable_log_stats=False,
        additional_config={
            "kv_compression": {"preset": "k8v4", "compress_after": 256, "keep_recent": 128}
        },
    )
    prompts = [{"prompt_token_ids": [1000 + n] * PROMPT} for n in range(sequences)]
    llm.generate(prompts, SamplingParams(max_tokens=DECODED, ignore_eos=True))
    decode = slice(-DECODED // 2, -1)  # the last steps, in which every sequence decodes
    own = median(counting[decode]) + median(publishing[decode])
    step = median(steps[decode])
    results = {
        "counting_us": median(counting[decode]) * 1e6,
        "publishing_us": median(publishing[decode]) * 1e6,
        "step_ms": step * 1e3,
        "share_of_step": own / step,
        "step_ms_at_half_a_percent": own / 0.005 * 1e3,
    }
    print(results)
    settings = {"sequences": sequences, "prompt_tokens": PROMPT, "preset": "k8v4"}
    record = make_record("metrics-overhead", [f"{sequences}"], model, settings, results)
    command = f"python benchmarks/metrics_overhead.py {sequences}"
    print(record.model_copy(update={"command": command}).write())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 64)
