"""The engine on a GPU: what fits, how fast it decodes, and what it delivers when memory is short.

Weights are random (`load_format dummy`): speed and capacity do not depend on them. Each engine
runs in a process of its own and goes through all loads; stock with bf16 and with fp8 K and V are
measured beside the presets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from vllm_kvpca.evaluation import engine
from vllm_kvpca.evaluation.engine import STOCK, EngineSettings
from vllm_kvpca.evaluation.load import random_prompts

STOCK_FP8 = "stock-fp8"
"""In place of a preset: vLLM without compression, K and V in fp8."""
DUMMY: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    # Fewer than vLLM's default: a start takes less time, and every engine gets the same.
    "compilation_config": {"cudagraph_capture_sizes": [1, 4, 16, 32, 64, 128, 192, 256]},
}


@dataclass(frozen=True)
class Load:
    """Requests that arrive at once; all generate `generated` tokens after `prompt` of them.

    `fits` says whether all of them find room in the cache together.
    """

    name: str
    requests: int
    prompt: int
    generated: int
    fits: bool = True


LOADS = (
    Load("decode", 32, 4096, 257),
    Load("memory-limited", 96, 4096, 2048, fits=False),
    Load("below compress_after", 64, 256, 200),
)
PROMPTS = (2048, 8192, 32000)
"""Prompts for time to first token: the first two fit one chunk, the last needs several."""
REPEATS = 3


def measure(settings: EngineSettings) -> dict[str, Any]:
    """Tokens that fit, tokens per second under every load, milliseconds to the first token."""
    return engine.in_process(_measure, settings)


def _measure(settings: EngineSettings) -> dict[str, Any]:
    llm = engine.start(settings, in_core=False, **DUMMY)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    try:
        _generate(llm, vocabulary, Load("warm-up", 8, 600, 32))
        results: dict[str, Any] = {
            "tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
            "loads": [_load(llm, vocabulary, load) for load in LOADS],
            "first_token_milliseconds": {
                str(length): _first_token(llm, vocabulary, length) for length in PROMPTS
            },
        }
    finally:
        engine.stop(llm)
    return results


def _generate(llm: Any, vocabulary: int, load: Load) -> float:
    """Seconds from the first request to the last answer."""
    from vllm import SamplingParams

    prompts = random_prompts(vocabulary, load.requests, load.prompt, seed=load.prompt)
    params = SamplingParams(
        temperature=0, max_tokens=load.generated, ignore_eos=True, detokenize=False
    )
    begin = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return time.perf_counter() - begin


def _load(llm: Any, vocabulary: int, load: Load) -> dict[str, Any]:
    """Generated tokens per second: where all requests run at once without the prefill, which a
    run with one token each measures; where they take turns, over all."""
    prefill = _generate(llm, vocabulary, replace(load, generated=1)) if load.fits else 0.0
    seconds = _generate(llm, vocabulary, load)
    tokens = load.requests * (load.generated - (1 if load.fits else 0))
    return {
        **asdict(load),
        "seconds": seconds,
        "prefill_seconds": prefill,
        "tokens_per_second": tokens / (seconds - prefill),
    }


def _first_token(llm: Any, vocabulary: int, length: int) -> float:
    load = Load("first token", 1, length, 1)
    return median(_generate(llm, vocabulary, load) for _ in range(REPEATS)) * 1e3


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results of a record: each engine's, and its ratios to stock in bf16."""
    stock = results[STOCK]
    return {
        "engines": results,
        "against_stock": {name: _ratios(stock, other) for name, other in results.items()},
    }


def _ratios(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    loads = {
        theirs["name"]: theirs["tokens_per_second"] / ours["tokens_per_second"]
        for ours, theirs in zip(stock["loads"], other["loads"], strict=True)
    }
    ours_ms, theirs_ms = (x["first_token_milliseconds"] for x in (stock, other))
    return {
        "tokens": other["tokens"] / stock["tokens"],
        "loads": loads,
        "first_token_time": {length: theirs_ms[length] / ours_ms[length] for length in ours_ms},
    }


def run(settings: EngineSettings, names: Sequence[str]) -> dict[str, Any]:
    """Every engine in turn: stock, stock-fp8, and presets by name."""
    results: dict[str, dict[str, Any]] = {}
    for name in names:
        chosen = _settings(settings, name)
        begin = time.monotonic()
        results[name] = measure(chosen)
        print(f"{name}: {time.monotonic() - begin:.0f} s, {results[name]}", flush=True)
    return compare(results)


def _settings(settings: EngineSettings, name: str) -> EngineSettings:
    if name == STOCK_FP8:
        return settings.model_copy(update={"preset": STOCK, "kv_cache_dtype": "fp8"})
    return settings.model_copy(update={"preset": name})
