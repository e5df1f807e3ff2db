"""Cells that rows of several tables share."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.lab.engine import STOCK
from vllm_kvpca.lab.record import Record


def stored(record: Record) -> list[str]:
    """Preset, and its ratio of K and V together, with that of V alone beside it."""
    settings: Any = record.settings
    name = f"`{settings['preset']}`"
    if settings["preset"] == STOCK:
        name = f"stock, steps of {settings['max_num_batched_tokens']:,} tokens"
    return [name, ratios(settings)]


def ratios(about: Any) -> str:
    """The ratio of K and V together, with that of V alone beside it."""
    return f"{about['total_ratio']:.2f}x ({about['v_ratio']:.2f}x)"


def change(results: Any) -> str:
    """The change of perplexity with its 95 % interval."""
    low, high = results["perplexity_change_ci95"]
    return f"{results['perplexity_change']:+.2%} ({low:+.2%} to {high:+.2%})"


def thresholds(record: Record) -> str:
    return f"{record.settings['compress_after']} / {record.settings['keep_recent']}"
