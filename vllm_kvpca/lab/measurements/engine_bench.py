"""The engine on a GPU: what fits, how fast it decodes, and what it delivers when memory is short.

Weights are random (`load_format dummy`): speed and capacity do not depend on them. Each engine
runs in a process of its own and goes through all loads; stock with bf16 and with fp8 K and V are
measured beside the presets. The memory-limited load is a measurement of its own (`memory_short`):
both together take longer than many a borrowed GPU is at hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vllm_kvpca.lab import engine
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.measurements.throughput import random_prompts
from vllm_kvpca.lab.presets import attention_shape
from vllm_kvpca.lab.random_preset import CARD, random_preset
from vllm_kvpca.lab.record import model_name
from vllm_kvpca.preset import save_preset
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS

STOCK_FP8 = "stock-fp8"
"""In place of a preset: vLLM without compression, K and V in fp8."""
DUMMY: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    # Fewer than vLLM's default: a start takes less time, and every engine gets the same.
    "compilation_config": {
        "cudagraph_capture_sizes": [1, 4, 16, 32, 48, 64, 80, 96, 128, 192, 256]
    },
}


@dataclass(frozen=True)
class Load:
    """Requests that arrive at once; each generates `generated` tokens after `prompt` of them."""

    name: str
    requests: int
    prompt: int
    generated: int


LOADS = (Load("decode", 32, 4096, 257), Load("below compress_after", 64, 256, 200))
"""Loads whose requests fit the cache together."""
MEMORY_LIMITED = Load("memory-limited", 320, 4096, 2048)
"""Far more requests than fit, as on a busy server. `generated` is the mean: answers of half to
one and a half times as many tokens, so that requests come and go all the time."""
SECONDS = 30
"""How long the memory-limited load is watched, from its first finished answer on."""
PROMPTS = (2048, 8192, 32000)
"""Prompts for time to first token: the first two fit one chunk, the last needs several."""
REPEATS = 3
FIRST_TOKENS = 9
"""Single prompts timed for each length: one takes tens of milliseconds, give or take a few."""


def measure(settings: EngineSettings) -> dict[str, Any]:
    """Tokens that fit, tokens per second under every load, milliseconds to the first token."""
    return engine.in_process(_measure, settings)


def measure_memory_short(settings: EngineSettings) -> dict[str, Any]:
    """Output tokens per second while more requests wait than fit."""
    return engine.in_process(_measure_memory_short, settings)


def _measure(settings: EngineSettings) -> dict[str, Any]:
    with _warm(settings) as (llm, vocabulary):
        return {
            "tokens": _tokens_that_fit(llm),
            "loads": [_load(llm, vocabulary, load) for load in LOADS],
            "first_token_milliseconds": {
                str(length): _first_token(llm, vocabulary, length) for length in PROMPTS
            },
        }


def _measure_memory_short(settings: EngineSettings) -> dict[str, Any]:
    with _warm(settings) as (llm, vocabulary):
        tokens = _tokens_that_fit(llm)
        return {"tokens": tokens, **_memory_limited(llm, vocabulary, MEMORY_LIMITED)}


@contextmanager
def _warm(settings: EngineSettings) -> Iterator[tuple[Any, int]]:
    """An engine that has answered a few requests, and its vocabulary's size."""
    llm = engine.start(settings, in_core=False, **DUMMY)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    try:
        _generate(llm, vocabulary, Load("warm-up", 8, 600, 32))
        yield llm, vocabulary
    finally:
        engine.stop(llm)


def _tokens_that_fit(llm: Any) -> int:
    return int(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)


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
    """Decoded tokens per second: what a run takes longer than one with a token each."""
    runs = [
        (_generate(llm, vocabulary, replace(load, generated=1)), _generate(llm, vocabulary, load))
        for _ in range(REPEATS)
    ]
    prefill, seconds = median(run[0] for run in runs), median(run[1] for run in runs)
    tokens = load.requests * (load.generated - 1)
    return {
        **asdict(load),
        "seconds": seconds,
        "prefill_seconds": prefill,
        "tokens_per_second": tokens / (seconds - prefill),
    }


def _memory_limited(llm: Any, vocabulary: int, load: Load) -> dict[str, Any]:
    """Output tokens per second, prefill included, while requests wait for room.

    Raises:
        RuntimeError: the last request got in before the time was over.
    """
    engine = llm.llm_engine
    waiting = set(_add_requests(engine, vocabulary, load))
    everyone = list(waiting)
    tokens, begin, now = 0, None, 0.0
    while begin is None or now < begin + SECONDS:
        outputs = engine.step()
        now = time.perf_counter()
        waiting -= {output.request_id for output in outputs}
        if begin is not None:
            tokens += sum(len(output.outputs[0].token_ids) for output in outputs)
        elif any(output.finished for output in outputs):
            begin = now
        if not waiting:
            raise RuntimeError("no request waits any more: give the memory-limited load more.")
    engine.abort_request(everyone)
    while engine.has_unfinished_requests():
        engine.step()
    seconds = now - begin
    return {**asdict(load), "seconds": seconds, "tokens_per_second": tokens / seconds}


def _add_requests(engine: Any, vocabulary: int, load: Load) -> Iterator[str]:
    """Hand over all requests of a load with answers of random length, and yield their ids."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    lengths = np.random.default_rng(load.generated).integers(
        load.generated // 2, load.generated * 3 // 2, size=load.requests, endpoint=True
    )
    prompts = random_prompts(vocabulary, load.requests, load.prompt, seed=load.prompt)
    for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        params = SamplingParams(
            temperature=0,
            max_tokens=int(length),
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        engine.add_request(str(index), {"prompt_token_ids": prompt}, params)
        yield str(index)


def _first_token(llm: Any, vocabulary: int, length: int) -> float:
    load = Load("first token", 1, length, 1)
    return median(_generate(llm, vocabulary, load) for _ in range(FIRST_TOKENS)) * 1e3


def compare(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The results of a record: each engine's, and its ratios to stock in bf16."""
    stock = results[STOCK]
    return {
        "engines": results,
        "against_stock": {name: _ratios(stock, other) for name, other in results.items()},
    }


def compare_memory_short(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The same for the memory-limited load."""
    stock = results[STOCK]["tokens_per_second"]
    against = {name: other["tokens_per_second"] / stock for name, other in results.items()}
    return {"engines": results, "against_stock": against}


def _ratios(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    speeds, others = (
        {load["name"]: load["tokens_per_second"] for load in results["loads"]}
        for results in (stock, other)
    )
    loads = {name: others[name] / speed for name, speed in speeds.items()}
    ours_ms, theirs_ms = (x["first_token_milliseconds"] for x in (stock, other))
    return {
        "tokens": other["tokens"] / stock["tokens"],
        "loads": loads,
        "first_token_time": {length: theirs_ms[length] / ours_ms[length] for length in ours_ms},
    }


def run(
    settings: EngineSettings,
    names: Sequence[str],
    one: Callable[[EngineSettings], dict[str, Any]] = measure,
) -> Iterator[dict[str, dict[str, Any]]]:
    """What `one` measures of stock, stock-fp8 and presets: after each engine, all results so far.

    Args:
        names: stock comes first, whatever their order.
    """
    results: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        every = {name: _settings(settings, name, Path(folder)) for name in (STOCK, *names)}
        for name, chosen in every.items():
            begin = time.monotonic()
            results[name] = one(chosen)
            print(f"{name}: {time.monotonic() - begin:.0f} s, {results[name]}", flush=True)
            yield results


def _settings(settings: EngineSettings, name: str, folder: Path) -> EngineSettings:
    """Settings of one engine; presets with random bases are written into `folder`."""
    if name == STOCK_FP8:
        return settings.model_copy(update={"preset": STOCK, "kv_cache_dtype": "fp8"})
    if name not in CALIBRATED_FORMATS:
        return settings.model_copy(update={"preset": name})
    preset = random_preset(name, model_name(settings.model), attention_shape(settings.model))
    save_preset(folder / name, preset.config, preset.bases, CARD.format(name=name))
    return settings.model_copy(update={"preset": str(folder / name)})
