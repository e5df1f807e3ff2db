"""Engines on a GPU: what fits, how fast they decode, and how soon the first token comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from vllm_kvpca.lab import engine, gpu_engines
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.gpu_engines import Load, Results, generate, tokens_that_fit, warm_engine
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table

LOADS = (Load("decode", 32, 4096, 257), Load("below compress_after", 64, 256, 200))
"""Loads whose requests fit the cache together."""
PROMPTS = (2048, 8192, 32000)
"""Prompts for time to first token: the first two fit one chunk, the last needs several."""
REPEATS = 3
FIRST_TOKENS = 9
"""Single prompts timed for each length: one takes tens of milliseconds, give or take a few."""


def run(
    model: str,
    names: Sequence[str],
    kv_gib: float = 10,
    max_model_len: int = 32768,
    seed: int = 0,
) -> Iterator[Record]:
    """A record of kind "engine" after each engine, which holds all that were measured so far: a
    run that is cut short leaves one of the others.

    Args:
        names: stock, stock-fp8, presets, or calibrated formats, which get random bases.
    """
    settings = gpu_engines.settings_for(model, kv_gib, max_model_len, seed)
    return gpu_engines.records("engine", measure, compare, names, settings)


def measure(settings: EngineSettings) -> dict[str, Any]:
    """Tokens that fit, tokens per second under every load, milliseconds to the first token."""
    return engine.in_process(_measure, settings)


def _measure(settings: EngineSettings) -> dict[str, Any]:
    with warm_engine(settings) as (llm, vocabulary):
        return {
            "tokens": tokens_that_fit(llm),
            "loads": [_load(llm, vocabulary, load) for load in LOADS],
            "first_token_milliseconds": {
                str(length): _first_token(llm, vocabulary, length) for length in PROMPTS
            },
        }


def _load(llm: Any, vocabulary: int, load: Load) -> dict[str, Any]:
    """Decoded tokens per second: what a run takes longer than one with a token each."""
    runs = [
        (generate(llm, vocabulary, replace(load, generated=1)), generate(llm, vocabulary, load))
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


def _first_token(llm: Any, vocabulary: int, length: int) -> float:
    load = Load("first token", 1, length, 1)
    return median(generate(llm, vocabulary, load) for _ in range(FIRST_TOKENS)) * 1e3


def compare(results: Results) -> dict[str, Any]:
    """The results of a record: each engine's, and its ratios to stock in bf16."""
    stock = results[STOCK]
    return {
        "engines": results,
        "against_stock": {name: _ratios(stock, other) for name, other in results.items()},
    }


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


def _rows(record: Record) -> list[list[str]]:
    """A line for each engine: what fits, then output tokens per second under each load."""
    results: Any = record.results
    rows = []
    for name, found in results["engines"].items():
        against = results["against_stock"][name]
        cells = [f"{found['tokens']:,} ({against['tokens']:.2f}x)"]
        speeds = {load["name"]: load["tokens_per_second"] for load in found["loads"]}
        for load in ("decode", "below compress_after"):
            cells.append(f"{speeds[load]:,.0f} ({against['loads'][load]:.2f}x)")
        for length, milliseconds in found["first_token_milliseconds"].items():
            ratio = against["first_token_time"][length]
            cells.append(f"{milliseconds:,.0f} ms ({ratio:.2f}x)")
        rows.append([f"`{name}`", *cells])
    return rows


TABLES = {
    "engine": Table(
        [
            "engine",
            "tokens that fit",
            "decoded tokens/s, 32 x 4,096",
            "decoded tokens/s, below compress_after",
            "first token, 2,048",
            "8,192",
            "32,000",
        ],
        _rows,
        "vllm-kvpca bench engine",
    )
}
