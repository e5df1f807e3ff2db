"""What an engine on a GPU delivers when memory is short: far more requests wait than fit.

A measurement apart from engine_bench: both together take longer than many a borrowed GPU is at
hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vllm_kvpca.lab import engine, gpu_engines, texts
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.gpu_engines import Load, Results, tokens_that_fit, warm_engine
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table

LOAD = Load("memory-limited", 320, 4096, 2048)
"""Far more requests than fit, as on a busy server. `generated` is the mean: answers of half to
one and a half times as many tokens, so that requests come and go all the time."""
SECONDS = 30
"""How long the load is watched, from its first finished answer on."""


def run(
    model: str,
    names: Sequence[str],
    kv_gib: float = 10,
    max_model_len: int = 32768,
    seed: int = 0,
) -> Iterator[Record]:
    """Records of kind "memory-limited", as engine_bench.run makes its own."""
    settings = gpu_engines.settings_for(model, kv_gib, max_model_len, seed)
    return gpu_engines.records("memory-limited", measure, compare, names, settings)


def measure(settings: EngineSettings) -> dict[str, Any]:
    """Output tokens per second while more requests wait than fit."""
    return engine.in_process(_measure, settings)


def _measure(settings: EngineSettings) -> dict[str, Any]:
    with warm_engine(settings) as (llm, vocabulary):
        tokens = tokens_that_fit(llm)
        return {"tokens": tokens, **_output_speed(llm, vocabulary, LOAD)}


def _output_speed(llm: Any, vocabulary: int, load: Load) -> dict[str, Any]:
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
    prompts = texts.random_prompts(vocabulary, load.requests, load.prompt, seed=load.prompt)
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


def compare(results: Results) -> dict[str, Any]:
    """The results of a record: each engine's, and its speed against stock in bf16."""
    stock = results[STOCK]["tokens_per_second"]
    against = {name: other["tokens_per_second"] / stock for name, other in results.items()}
    return {"engines": results, "against_stock": against}


def _rows(record: Record) -> list[list[str]]:
    """A line for each engine: what fits, and output tokens per second while requests wait."""
    results: Any = record.results
    rows = []
    for name, found in results["engines"].items():
        ratio = results["against_stock"][name]
        speed = f"{found['tokens_per_second']:,.0f} ({ratio:.2f}x)"
        rows.append([f"`{name}`", f"{found['tokens']:,}", speed])
    return rows


TABLES = {
    "memory-limited": Table(
        ["engine", "tokens that fit", "output tokens/s while requests wait"],
        _rows,
        "vllm-kvpca bench memory-limited",
    )
}
