"""Cells that rows of several tables share."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.evaluation.engine import STOCK
from vllm_kvpca.evaluation.record import Record


def stored(record: Record) -> list[str]:
    """Preset, and its ratio of K and V together, with that of V alone beside it."""
    settings: Any = record.settings
    name = f"`{settings['preset']}`"
    if settings["preset"] == STOCK:
        name = f"stock, steps of {settings['max_num_batched_tokens']:,} tokens"
    return [name, f"{settings['total_ratio']:.2f}x ({settings['v_ratio']:.2f}x)"]


def thresholds(record: Record) -> str:
    return f"{record.settings['compress_after']} / {record.settings['keep_recent']}"
