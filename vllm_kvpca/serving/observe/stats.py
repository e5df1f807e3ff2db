"""What the cache holds right now, counted where the blocks are: in the scheduler.

The figures travel to the API server as `SchedulerStats.kvpca`, and to whoever asks for
`GET /kv_compression` by `engine_status` (see adapters.figures). Every step counts, in between the
model's steps: what is counted here is kept up to date where blocks come and go, and only what
has changed is sent.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from vllm.utils.math_utils import cdiv

from vllm_kvpca.metrics import METRICS
from vllm_kvpca.serving.cache.managers import ArchiveManager, RecentManager
from vllm_kvpca.serving.cache.pairs import find_pairs
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
    if fixed is None:
        return []
    ended: Counter[str] = Counter()
    for pair in fixed.pairs:
        for name, tokens in pair.archive.ended.items():
            ended[name] += tokens * pair.layers
        pair.archive.ended.clear()
    # Preempted requests gave their blocks back too, but the scheduler still knows them.
    return [float(n // fixed.layers) for name, n in ended.items() if name not in scheduler.requests]


@dataclass(frozen=True)
class _PairOfManagers:
    """The groups that serve the same layers.

    Attributes:
        layers: how many those are.
        token_bytes: archived bytes of one token over these layers and local KV heads.
        raw_blocks: raw blocks that the tokens of one archive block would take.
    """

    recent: RecentManager
    archive: ArchiveManager
    layers: int
    token_bytes: int
    raw_blocks: float


@dataclass(frozen=True)
class _Fixed:
    """What does not change while an engine runs; found once, because every step counts.

    Where layers differ in how much of a sequence they have archived, tokens are the mean over
    layers, and sequences those that any layer has archived a part of.

    Attributes:
        page: bytes of one block of the pool over all layers of a group.
    """

    pairs: tuple[_PairOfManagers, ...]
    page: int
    capacity: dict[str, int]

    @cached_property
    def layers(self) -> int:
        return sum(pair.layers for pair in self.pairs)

    def mean(self, value: Callable[[_PairOfManagers], int]) -> int:
        """Of a number of tokens, over all compressed layers."""
        return sum(pair.layers * value(pair) for pair in self.pairs) // self.layers


def _fixed(scheduler: Any) -> _Fixed | None:
    if not hasattr(scheduler, "kvpca_fixed"):
        scheduler.kvpca_fixed = _find_fixed(scheduler)
    return scheduler.kvpca_fixed


def _find_fixed(scheduler: Any) -> _Fixed | None:
    groups = scheduler.kv_cache_config.kv_cache_groups
    managers = scheduler.kv_cache_manager.coordinator.single_type_managers
    pairs = []
    for pair in find_pairs(groups):
        archived = groups[pair.archive]
        spec, layers = archived.kv_cache_spec, len(archived.layer_names)
        token_bytes = spec.state_content_size_bytes * spec.num_kv_heads * layers
        recent, archive = managers[pair.recent], managers[pair.archive]
        blocks = pair.policy.align / pair.raw_block
        pairs.append(_PairOfManagers(recent, archive, layers, token_bytes, blocks))
    if not pairs:
        return None
    page = max(g.kv_cache_spec.page_size_bytes * len(g.layer_names) for g in groups)
    return _Fixed(tuple(pairs), page, _capacity(scheduler))


def cache_stats(scheduler: Any) -> dict[str, float] | None:
    """Figures of one engine, None if it does not compress.

    Returns:
        A flat dictionary of numbers; keys are the metrics' keys, with the state appended
        where a metric has one.
    """
    fixed = _fixed(scheduler)
    if fixed is None:
        return None
    pairs, first = fixed.pairs, fixed.pairs[0]
    tokens, sequences = _computed(scheduler, first.recent)
    # Archive rows end at the boundary, or behind it after a prefix hit: never in a block that is
    # only partly computed. Shared blocks count for each sequence.
    archived_tokens = fixed.mean(lambda pair: pair.archive.uses * pair.archive.block_size)
    archived_sequences = max(pair.archive.sequences for pair in pairs)
    raw_bytes = fixed.page * sum(len(pair.recent.held) for pair in pairs)
    archived_bytes = fixed.page * sum(len(pair.archive.held) for pair in pairs)
    as_raw = fixed.page * sum(len(pair.archive.held) * pair.raw_blocks for pair in pairs)
    saved = int(as_raw) - archived_bytes
    used = raw_bytes + archived_bytes
    written = sum(pair.archive.archived_tokens * pair.token_bytes for pair in pairs)
    return {
        "kv_cache_bytes/raw": raw_bytes,
        "kv_cache_bytes/archived": archived_bytes,
        "kv_cache_bytes/free": fixed.page * first.archive.block_pool.get_num_free_blocks(),
        "kv_cache_tokens/raw": tokens - archived_tokens,
        "kv_cache_tokens/archived": archived_tokens,
        "kv_cache_saved_bytes": saved,
        "kv_cache_compression_ratio": (used + saved) / used if used else 1.0,
        "sequences/raw": sequences - archived_sequences,
        "sequences/archived": archived_sequences,
        "archived_tokens": fixed.mean(lambda pair: pair.archive.archived_tokens),
        "archive_operations": max(pair.archive.archive_operations for pair in pairs),
        "archive_written_bytes": written,
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
        if isinstance(spec, RecentSpec | ArchiveSpec):
            compressed += spec.decoding_blocks(max_model_len)
            raw += cdiv(max_model_len, spec.block_size) if isinstance(spec, RecentSpec) else 0
        else:
            need = cdiv(spec.max_memory_usage_bytes(scheduler.vllm_config), spec.page_size_bytes)
            compressed += need
            raw += need
    return {
        "kv_cache_capacity_tokens": int(config.num_blocks / compressed * max_model_len),
        "kv_cache_capacity_raw_tokens": int(config.num_blocks / raw * max_model_len),
    }


def engine_status(scheduler: Any) -> dict[str, Any] | None:
    """Layers, pages and figures of one engine for `GET /kv_compression`, in plain types.

    Returns:
        None if the engine does not compress. Counters are totals since the engine started,
        histograms the count and sum of their observations. Of several kinds of compressed layers,
        shapes and block sizes are the first one's.
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
    pair = find_pairs(groups)[0]
    recent = groups[pair.recent].kv_cache_spec
    return {
        "layers": [
            {"kind": type(group.kv_cache_spec).__name__, "names": list(group.layer_names)}
            for group in groups
            if not isinstance(group.kv_cache_spec, ArchiveSpec)
        ],
        "head_dim": recent.head_size,
        "kv_heads": recent.num_kv_heads,
        "raw_block": pair.raw_block,
        "archive_block": pair.policy.align,
        "page_bytes": recent.page_size_bytes,
        "step": pair.policy.align,
        "figures": figures,
    }
