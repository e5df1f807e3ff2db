"""The table of panels: what each shows, by which query, and between which bounds it is sane.

Ours stand beside vLLM's own series, so that cause (memory) and effect (waiting, preemption,
latency) are on one page.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from vllm_kvpca.metrics import all_series

SELECTOR = 'job=~"$job",instance=~"$instance",model_name=~"$model_name",engine=~"$engine"'
WINDOW = "$__rate_interval"


@dataclass(frozen=True)
class Query:
    """One PromQL expression; `legend` may use its labels, as Grafana writes them."""

    expr: str
    legend: str


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        unit: as Grafana names it.
        text: what it means; names the metrics.
        sane: bounds between which every value lies on a healthy server.
        moves: whether some value must be above 0 on a server with traffic of long requests.
        warn, alarm: where the colour changes; `alarm` may be below `warn`.
        stacked: series add up to a whole.
    """

    title: str
    unit: Literal["bytes", "short", "percentunit", "s", "x", "ops"]
    text: str
    queries: tuple[Query, ...]
    sane: tuple[float, float]
    moves: bool = True
    warn: float | None = None
    alarm: float | None = None
    stacked: bool = False
    kind: Literal["timeseries", "stat"] = "timeseries"


@dataclass(frozen=True)
class Row:
    title: str
    panels: tuple[Panel, ...]


def _sum(series: str, by: str = "", labels: str = "") -> str:
    grouped = f" by ({by})" if by else ""
    chosen = f"{SELECTOR},{labels}" if labels else SELECTOR
    return f"sum{grouped} ({series}{{{chosen}}})"


def _rate(series: str, labels: str = "") -> str:
    chosen = f"{SELECTOR},{labels}" if labels else SELECTOR
    return f"sum (rate({series}{{{chosen}}}[{WINDOW}]))"


def _quantiles(name: str) -> tuple[Query, ...]:
    return tuple(
        Query(
            f"histogram_quantile({q}, sum by (le) (rate({name}_bucket{{{SELECTOR}}}[{WINDOW}])))",
            f"p{int(q * 100)}",
        )
        for q in (0.5, 0.95)
    )


BYTES = "kvpca_kv_cache_bytes"
TOKENS = "kvpca_kv_cache_tokens"
CAPACITY, CAPACITY_RAW = "kvpca_kv_cache_capacity_tokens", "kvpca_kv_cache_capacity_raw_tokens"
_FREE = _sum(BYTES, labels='state="free"')
_ANY = (0.0, 1e15)

ROWS: tuple[Row, ...] = (
    Row(
        "Memory now",
        (
            Panel(
                "KV cache by state",
                "bytes",
                f"`{BYTES}`: blocks with raw tokens, with archived tokens, and free ones.",
                (Query(_sum(BYTES, "state"), "{{state}}"),),
                _ANY,
                stacked=True,
            ),
            Panel(
                "Saved",
                "bytes",
                "`kvpca_kv_cache_saved_bytes`: what the archived tokens would take raw, minus what "
                "they take.",
                (Query(_sum("kvpca_kv_cache_saved_bytes"), "saved"),),
                _ANY,
            ),
            Panel(
                "In use",
                "percentunit",
                f"Share of `{BYTES}` that is not free, and `vllm:kv_cache_usage_perc`: they agree.",
                (
                    Query(f"1 - {_FREE} / {_sum(BYTES)}", "kvpca"),
                    Query(f"avg (vllm:kv_cache_usage_perc{{{SELECTOR}}})", "vLLM"),
                ),
                (0.0, 1.0),
                warn=0.85,
                alarm=0.95,
            ),
            Panel(
                "Compression ratio now",
                "x",
                "`kvpca_kv_cache_compression_ratio`: bytes that the blocks in use would take raw "
                "over those they take. 1 while nothing is archived.",
                (
                    Query(
                        f"avg (kvpca_kv_cache_compression_ratio{{{SELECTOR}}})", "K and V together"
                    ),
                ),
                (1.0, 8.0),
            ),
        ),
    ),
    Row(
        "Capacity",
        (
            Panel(
                "Tokens that fit",
                "short",
                f"`{CAPACITY}` and `{CAPACITY_RAW}`, in sequences of max_model_len.",
                (
                    Query(_sum(CAPACITY), "compressed"),
                    Query(_sum(CAPACITY_RAW), "everything raw"),
                ),
                (1.0, 1e12),
            ),
            Panel(
                "Against stock",
                "x",
                f"`{CAPACITY}` over `{CAPACITY_RAW}`.",
                (Query(f"{_sum(CAPACITY)} / {_sum(CAPACITY_RAW)}", "times stock"),),
                (0.9, 8.0),
                warn=1.2,
                alarm=1.05,
                kind="stat",
            ),
            Panel(
                "Presets",
                "short",
                "`kvpca_preset_info`: engines by preset. An engine that is missing here does not "
                "compress.",
                (Query(_sum("kvpca_preset_info", "preset, format"), "{{preset}} ({{format}})"),),
                (1.0, 1e5),
                kind="stat",
            ),
        ),
    ),
    Row(
        "Requests",
        (
            Panel(
                "Requests",
                "short",
                "`vllm:num_requests_running` and `vllm:num_requests_waiting`.",
                (
                    Query(_sum("vllm:num_requests_running"), "running"),
                    Query(_sum("vllm:num_requests_waiting"), "waiting"),
                ),
                (0.0, 1e6),
            ),
            Panel(
                "Preemptions per second",
                "ops",
                "`vllm:num_preemptions_total`: requests put back for lack of memory.",
                (Query(_rate("vllm:num_preemptions_total"), "preemptions"),),
                (0.0, 1e4),
                moves=False,
                warn=0.1,
                alarm=0.5,
            ),
            Panel(
                "Tokens per second",
                "short",
                "`vllm:prompt_tokens_total` and `vllm:generation_tokens_total`.",
                (
                    Query(_rate("vllm:prompt_tokens_total"), "prompt"),
                    Query(_rate("vllm:generation_tokens_total"), "generated"),
                ),
                (0.0, 1e8),
            ),
            Panel(
                "Prefix cache hits",
                "percentunit",
                "`vllm:prefix_cache_hits_total` over `vllm:prefix_cache_queries_total`, in tokens.",
                (
                    Query(
                        f"{_rate('vllm:prefix_cache_hits_total')} / "
                        f"{_rate('vllm:prefix_cache_queries_total')}",
                        "tokens found",
                    ),
                ),
                (0.0, 1.0),
                moves=False,
            ),
        ),
    ),
    Row(
        "Adaptive behaviour",
        (
            Panel(
                "Sequences",
                "short",
                "`kvpca_sequences`: those that are raw, and those with an archived part.",
                (Query(_sum("kvpca_sequences", "state"), "{{state}}"),),
                (0.0, 1e6),
                stacked=True,
            ),
            Panel(
                "Tokens",
                "short",
                f"`{TOKENS}`: raw and archived tokens of the sequences in the cache.",
                (Query(_sum(TOKENS, "state"), "{{state}}"),),
                _ANY,
                stacked=True,
            ),
            Panel(
                "Archived per second",
                "short",
                "`kvpca_archived_tokens_total`.",
                (Query(_rate("kvpca_archived_tokens_total"), "tokens"),),
                (0.0, 1e8),
            ),
            Panel(
                "Archive writes",
                "bytes",
                "`kvpca_archive_written_bytes_total` per second.",
                (Query(_rate("kvpca_archive_written_bytes_total"), "bytes per second"),),
                _ANY,
            ),
            Panel(
                "Archive operations per second",
                "ops",
                "`kvpca_archive_operations_total`: one is what a sequence archives in one step.",
                (Query(_rate("kvpca_archive_operations_total"), "operations"),),
                (0.0, 1e6),
            ),
            Panel(
                "Archived tokens per request",
                "short",
                "`kvpca_request_archived_tokens`, of requests that ended.",
                _quantiles("kvpca_request_archived_tokens"),
                (0.0, 1e7),
            ),
            Panel(
                "Archive time per step",
                "s",
                "`kvpca_archive_step_seconds`, sampled.",
                _quantiles("kvpca_archive_step_seconds"),
                (0.0, 1.0),
            ),
        ),
    ),
    Row(
        "Latency",
        (
            Panel(
                "Time to first token",
                "s",
                "`vllm:time_to_first_token_seconds`.",
                _quantiles("vllm:time_to_first_token_seconds"),
                (0.0, 600.0),
            ),
            Panel(
                "Time between tokens",
                "s",
                "`vllm:inter_token_latency_seconds`.",
                _quantiles("vllm:inter_token_latency_seconds"),
                (0.0, 60.0),
            ),
        ),
    ),
)


def panels() -> Iterator[Panel]:
    """All panels, row by row."""
    return (panel for row in ROWS for panel in row.panels)


def undefined(text: str) -> list[str]:
    """Names of ours in a query or a rule file that no metric has."""
    names = set(re.findall(r"\bkvpca_[a-z0-9_]+", text))
    return sorted(names - set(all_series()))
