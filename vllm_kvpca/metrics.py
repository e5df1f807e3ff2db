"""The one table of metrics: name, type, unit, labels, help.

The stat logger creates its Prometheus metrics from it; docs/metrics.md, the answer of
`GET /kv_compression` and the dashboards are made from it or checked against it. All metrics
carry vLLM's own labels `model_name` and `engine`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

COMMON_LABELS = ("model_name", "engine")


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        key: its name without the prefix `kvpca_`, and for counters without `_total`.
        states: the values of the label `state`.
        buckets: upper limits of a histogram's buckets.
    """

    key: str
    kind: Literal["gauge", "counter", "histogram"]
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        return f"kvpca_{self.key}"

    @property
    def series(self) -> tuple[str, ...]:
        """Names of its time series in Prometheus."""
        suffixes = {"gauge": ("",), "counter": ("_total",)}
        endings = suffixes.get(self.kind, ("_bucket", "_sum", "_count"))
        return tuple(self.name + ending for ending in endings)


METRICS: tuple[Metric, ...] = (
    Metric(
        "kv_cache_bytes",
        "gauge",
        "bytes",
        "KV cache memory by state, from the block pool: blocks that hold raw tokens, blocks "
        "that hold archived tokens, and free blocks (cached prefixes that may be evicted "
        "count as free). Of one tensor-parallel rank; all ranks hold the same.",
        ("state",),
        states=("raw", "archived", "free"),
    ),
    Metric(
        "kv_cache_tokens",
        "gauge",
        "tokens",
        "Computed tokens of the sequences in the cache, by state. A token that several "
        "sequences share through the prefix cache counts for each of them.",
        ("state",),
        states=("raw", "archived"),
    ),
    Metric(
        "kv_cache_saved_bytes",
        "gauge",
        "bytes",
        "Bytes that the tokens in archive blocks would take raw, minus what they take now. Of "
        "one tensor-parallel rank.",
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
        states=("raw", "archived"),
    ),
    Metric(
        "archived_tokens",
        "counter",
        "tokens",
        "Tokens archived. Tokens that a request finds archived in the prefix cache do not count.",
    ),
    Metric(
        "archive_operations",
        "counter",
        "operations",
        "Archive operations: one is what one sequence archives in one step.",
    ),
    Metric(
        "archive_written_bytes",
        "counter",
        "bytes",
        "Bytes written into archive blocks, scales included. Of one tensor-parallel rank.",
    ),
    Metric(
        "request_archived_tokens",
        "histogram",
        "tokens",
        "Tokens of a request that lay in the archive when it ended; 0 if it stayed raw.",
        buckets=(0, *(2**power for power in range(8, 18))),
    ),
    Metric(
        "archive_step_seconds",
        "histogram",
        "seconds",
        "Time one step spends archiving, over all layers: a sample, measured in one layer. Steps "
        "that replay a full CUDA graph are not sampled.",
        buckets=tuple(base * 10.0**power for power in range(-5, 0) for base in (1, 2.5, 5)) + (1,),
    ),
    Metric(
        "preset_info",
        "gauge",
        "info",
        "Always 1; its labels name the preset and its format.",
        ("preset", "format"),
    ),
)


def shown_name(metric: Metric) -> str:
    """Name of a metric in documents: as Prometheus shows it."""
    return metric.series[0] if metric.kind == "counter" else metric.name


def all_series() -> dict[str, Metric]:
    """Every time series of the table, by name."""
    return {series: metric for metric in METRICS for series in metric.series}
