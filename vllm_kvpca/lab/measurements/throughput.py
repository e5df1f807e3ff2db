"""Speed of an engine under concurrent requests: prompt tokens and decoded tokens per second.

All requests arrive at once. The prefill phase is a run that generates one token per request; a
second run of the same requests generates `generated` tokens, and what it takes longer is the
decode phase, in which every request decodes `generated - 1` tokens. Prefix caching is off, so
both runs compute their prompts anew. The engine runs as vLLM starts it by default, its core in a
process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from vllm_kvpca.lab import engine, presets, texts
from vllm_kvpca.lab.against_stock import record_of
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.progress import steps
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import PRESET_HEADS, Table, one_row, stored


def run(
    model: str,
    preset_names: Sequence[str],
    requests: int = 16,
    prompt_tokens: int = 1000,
    generated: int = 128,
    repeats: int = 3,
    seed: int = 0,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "throughput": one for each preset."""
    presets.check(preset_names, model)
    prompts = texts.random_prompts(texts.vocabulary(model), requests, prompt_tokens, seed)
    common = EngineSettings(model=model, max_num_seqs=requests, seed=seed, **more)

    def timed(settings: EngineSettings) -> dict[str, Any]:
        times = measure(settings, prompts, generated, repeats)
        return speeds(times, requests, prompt_tokens, generated)

    stock = timed(common)
    chosen = {
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated,
        "repeats": repeats,
    }
    for name in preset_names:
        settings = common.model_copy(update={"preset": name})
        results = compare(stock, timed(settings))
        yield record_of("throughput", settings, results, chosen)


def measure(
    settings: EngineSettings, prompts: Sequence[Sequence[int]], generated: int, repeats: int
) -> list[tuple[float, float]]:
    """Seconds of the prefill and of the decode phase for each repeat, after one warm-up run."""
    return engine.in_process(_measure, settings, prompts, generated, repeats)


def _measure(
    settings: EngineSettings, prompts: Sequence[Sequence[int]], generated: int, repeats: int
) -> list[tuple[float, float]]:
    llm = engine.start(settings, in_core=False)
    times = []
    try:
        with steps(settings.preset, repeats + 1) as step:
            for _ in range(repeats + 1):
                prefill = _seconds(llm, prompts, 1)
                times.append((prefill, _seconds(llm, prompts, generated) - prefill))
                step()
    finally:
        engine.stop(llm)
    return times[1:]


def _seconds(llm: Any, prompts: Sequence[Sequence[int]], generated: int) -> float:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False)
    inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    begin = time.perf_counter()
    llm.generate(inputs, params, use_tqdm=False)
    return time.perf_counter() - begin


def speeds(
    times: Sequence[tuple[float, float]], requests: int, length: int, generated: int
) -> dict[str, Any]:
    """Tokens per second of both phases: medians over the repeats, and every repeat."""
    prefill = [requests * length / seconds for seconds, _ in times]
    decode = [requests * (generated - 1) / seconds for _, seconds in times]
    return {
        "prompt_tokens_per_second": median(prefill),
        "decode_tokens_per_second": median(decode),
        "prompt_repeats": prefill,
        "decode_repeats": decode,
    }


def compare(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The results of a record; a ratio above 1 is faster than stock."""
    return {
        "stock": stock,
        "preset": other,
        **{
            f"{phase}_ratio": other[key] / stock[key]
            for phase in ("prompt", "decode")
            for key in [f"{phase}_tokens_per_second"]
        },
    }


def _row(record: Record) -> list[str]:
    results: Any = record.results
    cells = stored(record)
    for phase in ("prompt", "decode"):
        stock, own = (results[who][f"{phase}_tokens_per_second"] for who in ("stock", "preset"))
        cells += [f"{stock:,.0f}", f"{own:,.0f}", f"{results[f'{phase}_ratio']:.2f}x"]
    return cells


TABLES = {
    "throughput": Table(
        [
            *PRESET_HEADS,
            "prompt tokens/s, stock",
            "prompt tokens/s",
            "against stock",
            "decoded tokens/s, stock",
            "decoded tokens/s",
            "against stock",
        ],
        one_row(_row),
        "vllm-kvpca evaluate throughput",
    )
}
