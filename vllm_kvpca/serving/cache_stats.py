"""What the cache holds right now, counted where the blocks are: in the scheduler.

The figures travel to the API server as `SchedulerStats.kvpca` (see compat).
"""

from __future__ import annotations

from typing import Any

from vllm.utils.math_utils import cdiv

from vllm_kvpca.serving.groups import ArchiveManager, ArchiveSpec, RecentManager, RecentSpec


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
