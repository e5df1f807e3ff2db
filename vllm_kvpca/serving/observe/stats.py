"""What the cache holds right now, counted where the blocks are: in the scheduler.

The figures travel to the API server as `SchedulerStats.kvpca`, and to whoever asks for
`GET /kv_compression` by `engine_status` (see adapters.figures). Every step counts, in between the
model's steps: what is counted here is kept up to date where blocks come and go, and only what
has changed is sent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from vllm.utils.math_utils import cdiv

from vllm_kvpca.metrics import METRICS
from vllm_kvpca.serving.cache.managers import ArchiveManager, RecentManager
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.observe.times import SampleFetcher

COUNTERS = tuple(metric.key for metric in METRICS if metric.kind == "counter")
REPEAT_EVERY = 1.0
"""Seconds after which gauges that have not changed are sent again: reports may be published out
of order where several API servers share them, and an old value must not stay."""


@dataclass
class Sent:
    """What a scheduler has reported so far, kept on it as `kvpca_sent`.

    Attributes:
        figures: gauges and counters' totals at the last report.
        complete: when all gauges were last sent, time.monotonic seconds.
        observed: count and sum of each histogram's observations.
        samples: fetches archive times from the workers; None where there is no executor.
    """

    figures: dict[str, float] = field(default_factory=dict)
    complete: float = 0.0
    observed: dict[str, tuple[int, float]] = field(default_factory=dict)
    samples: SampleFetcher | None = None

    @staticmethod
    def of(scheduler: Any) -> Sent:
        if not hasattr(scheduler, "kvpca_sent"):
            scheduler.kvpca_sent = Sent()
        return scheduler.kvpca_sent


def take_stats(scheduler: Any) -> dict[str, Any] | None:
    """What to report with this step's statistics, None if the engine does not compress.

    Returns:
        Gauges as cache_stats has them, those that changed; of counters what was added since the
        last call, if anything; of histograms the list of new observations, if any. Each call
        must therefore reach a stat logger exactly once, whichever API server that one belongs to.
    """
    figures = cache_stats(scheduler)
    if figures is None:
        return None
    sent, now = Sent.of(scheduler), time.monotonic()
    last, sent.figures = sent.figures, figures
    if repeat := now - sent.complete >= REPEAT_EVERY:
        sent.complete = now
    changed: dict[str, Any] = {
        key: value for key, value in figures.items() if repeat or last.get(key) != value
    }
    for key in COUNTERS:
        if key in changed:
            changed[key] -= last.get(key, 0)
    new: dict[str, list[float]] = {
        "request_archived_tokens": _ended(scheduler),
        "archive_step_seconds": sent.samples.take() if sent.samples else [],
    }
    for key, values in new.items():
        if values:
            count, before = sent.observed.get(key, (0, 0.0))
            sent.observed[key] = (count + len(values), before + sum(values))
            changed[key] = values
    return changed


def _ended(scheduler: Any) -> list[float]:
    """Archived tokens of each request that has ended since the last call."""
    fixed = _fixed(scheduler)
    if fixed is None or not fixed.archive.ended:
        return []
    # Preempted requests gave their blocks back too, but the scheduler still knows them.
    values = [float(n) for name, n in fixed.archive.ended.items() if name not in scheduler.requests]
    fixed.archive.ended.clear()
    return values


@dataclass(frozen=True)
class _Fixed:
    """What does not change while an engine runs; found once, because every step counts.

    Attributes:
        page: bytes of one block of the pool over all layers of a group.
        token_bytes: archived bytes of one token over all layers and local KV heads.
        raw_blocks: raw blocks that the tokens of one archive block would take.
    """

    recent: RecentManager
    archive: ArchiveManager
    page: int
    token_bytes: int
    raw_blocks: float
    capacity: dict[str, int]


def _fixed(scheduler: Any) -> _Fixed | None:
    if not hasattr(scheduler, "kvpca_fixed"):
        scheduler.kvpca_fixed = _find_fixed(scheduler)
    return scheduler.kvpca_fixed


def _find_fixed(scheduler: Any) -> _Fixed | None:
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    recent = next((m for m in managers if isinstance(m, RecentManager)), None)
    archive = next((m for m in managers if isinstance(m, ArchiveManager)), None)
    if recent is None or archive is None:
        return None
    groups = scheduler.kv_cache_config.kv_cache_groups
    pages, archived = groups[recent.kv_cache_group_id], groups[archive.kv_cache_group_id]
    spec = archive.kv_cache_spec
    return _Fixed(
        recent,
        archive,
        pages.kv_cache_spec.page_size_bytes * len(pages.layer_names),
        spec.state_content_size_bytes * spec.num_kv_heads * len(archived.layer_names),
        archive.block_size / recent.block_size,
        _capacity(scheduler),
    )


def cache_stats(scheduler: Any) -> dict[str, float] | None:
    """Figures of one engine, None if it does not compress.

    Returns:
        A flat dictionary of numbers; keys are the metrics' keys, with the state appended
        where a metric has one.
    """
    fixed = _fixed(scheduler)
    if fixed is None:
        return None
    recent, archive = fixed.recent, fixed.archive
    tokens, sequences = _computed(scheduler, recent)
    # Archive rows end at the boundary, or behind it after a prefix hit: never in a block that is
    # only partly computed. Shared blocks count for each sequence.
    archived_tokens = archive.uses * archive.block_size
    raw_bytes = fixed.page * len(recent.held)
    archived_bytes = fixed.page * len(archive.held)
    saved = int(archived_bytes * fixed.raw_blocks) - archived_bytes
    used = raw_bytes + archived_bytes
    return {
        "kv_cache_bytes/raw": raw_bytes,
        "kv_cache_bytes/archived": archived_bytes,
        "kv_cache_bytes/free": fixed.page * archive.block_pool.get_num_free_blocks(),
        "kv_cache_tokens/raw": tokens - archived_tokens,
        "kv_cache_tokens/archived": archived_tokens,
        "kv_cache_saved_bytes": saved,
        "kv_cache_compression_ratio": (used + saved) / used if used else 1.0,
        "sequences/raw": sequences - archive.sequences,
        "sequences/archived": archive.sequences,
        "archived_tokens": archive.archived_tokens,
        "archive_operations": archive.archive_operations,
        "archive_written_bytes": archive.archived_tokens * fixed.token_bytes,
        **fixed.capacity,
    }


def _computed(scheduler: Any, recent: RecentManager) -> tuple[int, int]:
    """Computed tokens of the sequences that hold blocks, and how many those are."""
    holders, requests = recent.req_to_blocks, scheduler.running
    if len(requests) != len(holders):  # some wait while they hold blocks, or hold none yet
        known = [scheduler.requests.get(name) for name, rows in holders.items() if rows]
        requests = [request for request in known if request is not None]
    return sum([request.num_computed_tokens for request in requests]), len(requests)


def _capacity(scheduler: Any) -> dict[str, int]:
    """Tokens that fit, compressed and raw, by vLLM's own reckoning (a sequence of
    max_model_len tokens needs whole blocks of every group)."""
    config = scheduler.kv_cache_config
    max_model_len = scheduler.vllm_config.model_config.max_model_len
    compressed = raw = 0
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        need = cdiv(spec.max_memory_usage_bytes(scheduler.vllm_config), spec.page_size_bytes)
        compressed += need
        if isinstance(spec, RecentSpec):
            raw += cdiv(max_model_len, spec.block_size)
        elif not isinstance(spec, ArchiveSpec):
            raw += need
    return {
        "kv_cache_capacity_tokens": int(config.num_blocks / compressed * max_model_len),
        "kv_cache_capacity_raw_tokens": int(config.num_blocks / raw * max_model_len),
    }


def engine_status(scheduler: Any) -> dict[str, Any] | None:
    """Layers, pages and figures of one engine for `GET /kv_compression`, in plain types.

    Returns:
        None if the engine does not compress. Counters are totals since the engine started,
        histograms the count and sum of their observations.
    """
    figures = cache_stats(scheduler)
    if figures is None:
        return None
    observed = Sent.of(scheduler).observed
    for metric in METRICS:
        if metric.kind == "histogram":
            count, total = observed.get(metric.key, (0, 0.0))
            figures |= {f"{metric.key}/count": count, f"{metric.key}/sum": total}
    groups = scheduler.kv_cache_config.kv_cache_groups
    recent = next(g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, RecentSpec))
    archive = next(g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, ArchiveSpec))
    return {
        "layers": [
            {"kind": type(group.kv_cache_spec).__name__, "names": list(group.layer_names)}
            for group in groups
            if not isinstance(group.kv_cache_spec, ArchiveSpec)
        ],
        "head_dim": recent.head_size,
        "kv_heads": recent.num_kv_heads,
        "raw_block": recent.block_size,
        "archive_block": archive.block_size,
        "page_bytes": recent.page_size_bytes,
        "step": archive.policy.align,
        "figures": figures,
    }
