"""How many tokens fit into the same KV memory, as vLLM itself reports it at start.

vLLM counts sequences of max_model_len tokens: the number it logs as "KV cache size" is how many
of those fit at once, times their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vllm_kvpca.lab import engine, presets
from vllm_kvpca.lab.against_stock import record_of
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import PRESET_HEADS, Table, one_row, stored


def run(
    model: str,
    preset_names: Sequence[str],
    kv_gib: float = 1,
    max_model_len: int = 8192,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "capacity": one for each preset."""
    presets.check(preset_names, model)
    common = EngineSettings(model=model, max_model_len=max_model_len, kv_gib=kv_gib, **more)
    stock = measure(common)
    for name in preset_names:
        settings = common.model_copy(update={"preset": name})
        results = compare(stock, measure(settings))
        yield record_of("capacity", settings, results, {})


def measure(settings: EngineSettings) -> dict[str, Any]:
    """Start an engine in a process of its own and read what it found.

    The weights do not matter and are not loaded.

    Returns:
        tokens: what fits; blocks: of the pool; groups: per cache group its kind, tokens per
        block, bytes per block over all of its layers, and layers.
    """
    return engine.in_process(_measure, settings)


def _measure(settings: EngineSettings) -> dict[str, Any]:
    llm = engine.start(settings, load_format="dummy")
    config = engine.scheduler(llm).kv_cache_config
    return {
        "tokens": llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens,
        "blocks": config.num_blocks,
        "groups": [
            {
                "kind": type(group.kv_cache_spec).__name__.removesuffix("Spec"),
                "block_tokens": group.kv_cache_spec.block_size,
                "block_bytes": group.kv_cache_spec.page_size_bytes * len(group.layer_names),
                "layers": len(group.layer_names),
            }
            for group in config.kv_cache_groups
        ],
    }


def compare(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The results of a record."""
    return {
        "tokens_stock": stock["tokens"],
        "tokens": other["tokens"],
        "ratio": other["tokens"] / stock["tokens"],
        "engine_stock": stock,
        "engine": other,
    }


def _row(record: Record) -> list[str]:
    results: Any = record.results
    return [
        *stored(record),
        f"{results['tokens_stock']:,}",
        f"{results['tokens']:,}",
        f"{results['ratio']:.2f}x",
        f"{record.settings['kv_gib']:g} GiB",
        f"{record.settings['max_model_len']:,}",
    ]


TABLES = {
    "capacity": Table(
        [*PRESET_HEADS, "tokens, stock", "tokens", "against stock", "KV memory", "max_model_len"],
        one_row(_row),
        "vllm-kvpca evaluate capacity",
    )
}
