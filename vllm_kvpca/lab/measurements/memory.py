"""KV memory of one sequence over its length, from the page plan alone: no engine is started.

The same functions say in the server which blocks a sequence holds, and the record of a running
engine (kind "block-life") agrees with them: tests/lab/test_memory.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab.record import Record, make_record
from vllm_kvpca.pages import ArchiveLayout, choose_blocks, raw_token_bytes
from vllm_kvpca.pages.block_sizes import held_blocks
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS, FORMATS

STOCK_BLOCK = 16
"""Tokens per block of stock vLLM on a GPU."""
_PER_OCTAVE = 16
"""Lengths looked at between n and 2n: enough to show the steps of whole blocks."""


def run(
    model: str, formats: Sequence[str], max_model_len: int, compress_after: int, keep_recent: int
) -> Record:
    """A record of kind "memory": bytes of one decoding sequence at lengths up to max_model_len.

    Args:
        model: folder with a config.json, or a Hub name; all layers have full attention.
        formats: names of formats, calibrated or not.

    Raises:
        OptionsError: no such format.
    """
    layers, heads, head_dim = _shape(model)
    lengths = _lengths(max_model_len)
    token = raw_token_bytes(head_dim) * heads * layers
    policy = Policy(compress_after, keep_recent)
    rows = [_row(name, head_dim, layers * heads, lengths, policy) for name in formats]
    settings = {
        "layers": layers,
        "kv_heads": heads,
        "head_dim": head_dim,
        "max_model_len": max_model_len,
        "compress_after": compress_after,
        "keep_recent": keep_recent,
        "stock_block_tokens": STOCK_BLOCK,
    }
    results = {
        "lengths_tokens": lengths,
        "stock_bytes": [-(-n // STOCK_BLOCK) * STOCK_BLOCK * token for n in lengths],
        "formats": rows,
    }
    return make_record("memory", [f"{compress_after}-{keep_recent}"], model, settings, results)


def _row(
    name: str, head_dim: int, heads: int, lengths: Sequence[int], thresholds: Policy
) -> dict[str, Any]:
    """Of one format; `heads` counts those of all layers."""
    layout = format_layout(name, head_dim)
    raw = raw_token_bytes(head_dim)
    after, recent = thresholds.compress_after, thresholds.keep_recent
    plan = choose_blocks(raw, layout.content_bytes, compress_after=after, keep_recent=recent)
    policy = Policy(after, recent, plan.align)
    block = plan.page_bytes_per_head(raw) * heads
    held = [held_blocks(policy, plan.raw_block, n) for n in lengths]
    return {
        "format": name,
        "total_ratio": layout.total_ratio,
        "v_ratio": layout.v_ratio,
        "raw_block_tokens": plan.raw_block,
        "archive_block_tokens": plan.archive_block,
        "raw_bytes": [raw_blocks * block for raw_blocks, _ in held],
        "archive_bytes": [archive * block for _, archive in held],
    }


def format_layout(name: str, head_dim: int) -> ArchiveLayout:
    """Page layout of a format.

    Raises:
        OptionsError: no such format.
    """
    known: dict[str, Any] = {**FORMATS, **CALIBRATED_FORMATS}
    if name not in known:
        raise OptionsError(f"there is no format {name!r}; known: {', '.join(known)}.")
    k, v = known[name].k.resolve(head_dim), known[name].v.resolve(head_dim)
    return ArchiveLayout(head_dim, 16, k, v)


def _lengths(longest: int) -> list[int]:
    """Lengths from 64 tokens on, evenly on a logarithmic scale, the last one included."""
    found = {round(64 * 2 ** (i / _PER_OCTAVE)) for i in range(24 * _PER_OCTAVE)}
    return sorted({n for n in found if n < longest} | {longest})


def _shape(model: str) -> tuple[int, int, int]:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return config.num_hidden_layers, heads, head_dim
