"""Attend in plain torch."""

from __future__ import annotations

from vllm_kvpca.codec.bands import narrow
from vllm_kvpca.ops.attend.buckets import Bucket, buckets
from vllm_kvpca.ops.attend.parts import attend_archive, attend_new, attend_recent
from vllm_kvpca.ops.attend.softmax import Softmax, merge
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens


def attend(
    step: StepPlan,
    tokens: StepTokens,
    cache: LayerCache,
    softmax: Softmax,
    workspace: object = None,
) -> None:
    """Attention of all new tokens over archive, recent tokens and themselves, causally, into
    `tokens.output`; after `store` and `archive` of the same step. Needs no workspace."""
    for bucket in step.once("buckets", lambda: buckets(step)):
        _attend(bucket, tokens, cache, softmax)


def _attend(bucket: Bucket, tokens: StepTokens, cache: LayerCache, softmax: Softmax) -> None:
    batch, queries = bucket.tokens.shape
    kv_heads, head_dim = tokens.key.shape[1:]
    group = tokens.query.shape[1] // kv_heads
    query = tokens.query[bucket.tokens].float().view(batch, queries, kv_heads, group, head_dim)
    query = query.transpose(1, 2).flatten(2, 3)  # (batch, kv_heads, queries * group, head_dim)
    key, value = (x[bucket.tokens].float().transpose(1, 2) for x in (tokens.key, tokens.value))
    part = attend_new(query, key, value, group, softmax)
    if bucket.recent_table is not None:
        window = bucket.recent_skips, bucket.recent_lengths
        raw = attend_recent(query, cache.recent, bucket.recent_table, *window, softmax)
        part = merge(part, raw)
    if bucket.archive_table is not None:
        lengths = bucket.archive_lengths
        archived = attend_archive(
            query, cache.pages, bucket.archive_table, lengths, cache.codec, softmax
        )
        part = merge(part, archived)
    out = part.out.view(batch, kv_heads, queries, group, head_dim).transpose(1, 2).flatten(2, 3)
    tokens.output[bucket.tokens[bucket.valid]] = narrow(out[bucket.valid], tokens.output.dtype)
