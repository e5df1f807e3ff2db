"""The one table of metrics: name, type, unit, labels, help.

The stat logger creates its Prometheus metrics from it, and docs/metrics.md is generated
from it. All carry vLLM's own labels `model_name` and `engine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

COMMON_LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class Metric:
    """One metric; `key` is its name without the prefix `kvpca_`."""

    key: str
    kind: Literal["gauge", "counter"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"kvpca_{self.key}"


METRICS: tuple[Metric, ...] = (
    Metric(
        "kv_cache_bytes",
        "gauge",
        "bytes",
        "KV cache memory by state, from the block pool: blocks that hold raw tokens, blocks "
        "that hold archived tokens, and free blocks (cached prefixes that may be evicted "
        "count as free).",
        ("state",),
    ),
    Metric(
        "kv_cache_tokens",
        "gauge",
        "tokens",
        "Computed tokens of the sequences in the cache, by state. A token that several "
        "sequences share through the prefix cache counts for each of them.",
        ("state",),
    ),
    Metric(
        "kv_cache_saved_bytes",
        "gauge",
        "bytes",
        "Bytes that the tokens in archive blocks would take raw, minus what they take now.",
    ),
    Metric(
        "kv_cache_compression_ratio",
        "gauge",
        "ratio",
        "Bytes that the blocks in use would take raw over the bytes they take: K and V, "
        "scales and padding included. 1 while nothing is archived.",
    ),
    Metric(
        "kv_cache_capacity_tokens",
        "gauge",
        "tokens",
        "Tokens that fit in sequences of max_model_len, as vLLM counts them.",
    ),
    Metric(
        "kv_cache_capacity_raw_tokens",
        "gauge",
        "tokens",
        "Tokens that would fit if everything stayed raw.",
    ),
    Metric(
        "sequences",
        "gauge",
        "sequences",
        "Sequences that hold blocks: all their tokens raw, or some archived.",
        ("state",),
    ),
    Metric(
        "archived_tokens",
        "counter",
        "tokens",
        "Tokens archived since the engine started. Prometheus shows it as "
        "kvpca_archived_tokens_total.",
    ),
    Metric(
        "preset_info",
        "gauge",
        "info",
        "Always 1; its labels name the preset and its format.",
        ("preset", "format"),
    ),
)
