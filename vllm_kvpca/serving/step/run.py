"""Run one planned step of one layer: store raw, archive, attend over three parts.

The order matters: a prefix hit of the same step may read what this step archives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvpca.ops import merge, reference
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.serving.observe.times import timer
from vllm_kvpca.serving.step.batch import ArchiveWork, Bucket, Step


@dataclass(frozen=True)
class StepTokens:
    """A step's new tokens.

    Attributes:
        query, output: (tokens, heads, head_dim).
        key, value: (tokens, kv_heads, head_dim).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


def run_step(
    step: Step,
    tokens: StepTokens,
    recent: torch.Tensor,
    pages: torch.Tensor,
    codec: LayerCodec,
    scale: float,
    soft_cap: float | None = None,
) -> None:
    """Write the attention of all new tokens into `tokens.output`.

    Args:
        recent: (blocks, kv_heads, raw_block, 2 * head_dim) recent pages.
        pages: (blocks, kv_heads, head_bytes) uint8 archive pages.
        scale, soft_cap: see ops.attend.softmax.partial_attention.
    """
    reference.store(recent, tokens.key, tokens.value, step.store_slots)
    if step.archive is not None:
        started = timer.start(step, recent.device)
        _archive(step.archive, tokens, recent, pages, codec)
        timer.stop(started)
    for bucket in step.buckets:
        _attend(bucket, tokens, recent, pages, codec, scale, soft_cap)


def _archive(
    work: ArchiveWork,
    tokens: StepTokens,
    recent: torch.Tensor,
    pages: torch.Tensor,
    codec: LayerCodec,
) -> None:
    old_key, old_value = reference.load_recent(recent, work.recent_slots)
    reference.archive(
        pages,
        torch.cat([old_key, tokens.key[work.new_tokens]]),
        torch.cat([old_value, tokens.value[work.new_tokens]]),
        work.slots,
        codec,
    )


def _attend(
    bucket: Bucket,
    tokens: StepTokens,
    recent: torch.Tensor,
    pages: torch.Tensor,
    codec: LayerCodec,
    scale: float,
    soft_cap: float | None,
) -> None:
    batch, queries = bucket.tokens.shape
    kv_heads, head_dim = tokens.key.shape[1:]
    group = tokens.query.shape[1] // kv_heads
    query = tokens.query[bucket.tokens].float().view(batch, queries, kv_heads, group, head_dim)
    query = query.transpose(1, 2).flatten(2, 3)  # (batch, kv_heads, queries * group, head_dim)
    key, value = (x[bucket.tokens].float().transpose(1, 2) for x in (tokens.key, tokens.value))
    part = reference.attend_new(query, key, value, group, scale, soft_cap)
    if bucket.recent_table is not None:
        window = bucket.recent_skips, bucket.recent_lengths
        raw = reference.attend_recent(query, recent, bucket.recent_table, *window, scale, soft_cap)
        part = merge(part, raw)
    if bucket.archive_table is not None:
        lengths = bucket.archive_lengths
        archived = reference.attend_archive(
            query, pages, bucket.archive_table, lengths, codec, scale, soft_cap
        )
        part = merge(part, archived)
    out = part.out.view(batch, kv_heads, queries, group, head_dim).transpose(1, 2).flatten(2, 3)
    tokens.output[bucket.tokens[bucket.valid]] = out[bucket.valid].to(tokens.output.dtype)
