"""What the cache holds right now, counted where the blocks are: in the scheduler.

The figures travel to the API server as `SchedulerStats.kvpca`, and to whoever asks for
`GET /kv_compression` by `engine_status` (see compat).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.utils.math_utils import cdiv

from vllm_kvpca.metrics import METRICS
from vllm_kvpca.serving.archive_time import SampleFetcher
from vllm_kvpca.serving.groups import ArchiveManager, ArchiveSpec, RecentManager, RecentSpec

COUNTERS = tuple(metric.key for metric in METRICS if metric.kind == "counter")


@dataclass
class Sent:
    """What a scheduler has reported so far, kept on it as `kvpca_sent`.

    Attributes:
        totals: counters at the last report.
        observed: count and sum of each histogram's observations.
        samples: fetches archive times from the workers; None where there is no executor.
    """

    totals: dict[str, float] = field(default_factory=dict)
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
        Gauges as cache_stats has them; of counters what was added since the last call; of
        histograms the list of new observations. Each call must therefore reach a stat logger
        exactly once, whichever API server that one belongs to.
    """
    figures: dict[str, Any] | None = cache_stats(scheduler)
    if figures is None:
        return None
    sent = Sent.of(scheduler)
    for key in COUNTERS:
        total = figures[key]
        figures[key] = total - sent.totals.get(key, 0)
        sent.totals[key] = total
    new: dict[str, list[float]] = {
        "request_archived_tokens": _ended(scheduler),
        "archive_step_seconds": sent.samples.take() if sent.samples else [],
    }
    for key, values in new.items():
        if values:
            count, before = sent.observed.get(key, (0, 0.0))
            sent.observed[key] = (count + len(values), before + sum(values))
            figures[key] = values
    return figures


def _ended(scheduler: Any) -> list[float]:
    """Archived tokens of each request that has ended since the last call."""
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    archive = next(m for m in managers if isinstance(m, ArchiveManager))
    # Preempted requests gave their blocks back too, but the scheduler still knows them.
    values = [float(n) for name, n in archive.ended.items() if name not in scheduler.requests]
    archive.ended.clear()
    return values


def cache_stats(scheduler: Any) -> dict[str, float] | None:
    """Figures of one engine, None if it does not compress.

    Returns:
        A flat dictionary of numbers; keys are the metrics' keys, with the state appended
        where a metric has one.
    """
    coordinator = scheduler.kv_cache_manager.coordinator
    managers = coordinator.single_type_managers
    recent = next((m for m in managers if isinstance(m, RecentManager)), None)
    archive = next((m for m in managers if isinstance(m, ArchiveManager)), None)
    if recent is None or archive is None:
        return None
    raw_tokens, archived_tokens, raw_sequences, archived_sequences = _tokens(
        scheduler, recent, archive
    )
    page = _page_bytes(coordinator.kv_cache_config, recent.kv_cache_group_id)
    raw_bytes = page * len(recent.held)
    archived_bytes = page * len(archive.held)
    per_block = archive.block_size / recent.block_size
    saved = int(archived_bytes * per_block) - archived_bytes
    used = raw_bytes + archived_bytes
    return {
        "kv_cache_bytes/raw": raw_bytes,
        "kv_cache_bytes/archived": archived_bytes,
        "kv_cache_bytes/free": page * coordinator.block_pool.get_num_free_blocks(),
        "kv_cache_tokens/raw": raw_tokens,
        "kv_cache_tokens/archived": archived_tokens,
        "kv_cache_saved_bytes": saved,
        "kv_cache_compression_ratio": (used + saved) / used if used else 1.0,
        "sequences/raw": raw_sequences,
        "sequences/archived": archived_sequences,
        "archived_tokens": archive.archived_tokens,
        "archive_operations": archive.archive_operations,
        "archive_written_bytes": archive.archived_tokens * _token_bytes(coordinator, archive),
        **_capacity(scheduler),
    }


def _tokens(
    scheduler: Any, recent: RecentManager, archive: ArchiveManager
) -> tuple[int, int, int, int]:
    """Raw and archived tokens, raw and archived sequences."""
    raw = archived = raw_sequences = archived_sequences = 0
    for request_id, rows in recent.req_to_blocks.items():
        request = scheduler.requests.get(request_id)
        if request is None or not rows:
            continue
        computed = request.num_computed_tokens
        # The archive's rows end at the boundary, or behind it after a prefix hit.
        rows_archived = len(archive.req_to_blocks.get(request_id, ()))
        in_archive = min(computed, rows_archived * archive.block_size)
        archived += in_archive
        raw += computed - in_archive
        raw_sequences += in_archive == 0
        archived_sequences += in_archive > 0
    return raw, archived, raw_sequences, archived_sequences


def _token_bytes(coordinator: Any, archive: ArchiveManager) -> int:
    """Archived bytes of one token over all layers and local KV heads, without padding."""
    spec = archive.kv_cache_spec
    layers = coordinator.kv_cache_config.kv_cache_groups[archive.kv_cache_group_id].layer_names
    return spec.state_content_size_bytes * spec.num_kv_heads * len(layers)


def _page_bytes(kv_cache_config: Any, group: int) -> int:
    """Bytes of one block of the pool over all layers of a group."""
    spec = kv_cache_config.kv_cache_groups[group]
    return spec.kv_cache_spec.page_size_bytes * len(spec.layer_names)


def _capacity(scheduler: Any) -> dict[str, int]:
    """Tokens that fit, compressed and raw, by vLLM's own reckoning (a sequence of
    max_model_len tokens needs whole blocks of every group)."""
    cached = getattr(scheduler, "_kvpca_capacity", None)
    if cached is None:
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
        cached = scheduler._kvpca_capacity = {
            "kv_cache_capacity_tokens": int(config.num_blocks / compressed * max_model_len),
            "kv_cache_capacity_raw_tokens": int(config.num_blocks / raw * max_model_len),
        }
    return cached


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
