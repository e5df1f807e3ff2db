"""Archive in plain torch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.ops.positions import ranges, table_slots
from vllm_kvpca.ops.store.reference import load_recent
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens


class Moves(NamedTuple):
    """Tokens that a step archives: (old,) source slots in recent pages, (new,) source rows among
    the step's new tokens, and (old + new,) destinations and positions in their sequences."""

    old: torch.Tensor
    new: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor


def archive(step: StepPlan, tokens: StepTokens, cache: LayerCache) -> None:
    """Archive [starts_i, boundary(lengths_i)) of each sequence.

    Positions that were computed in earlier steps come from recent pages, the others from the
    step's own keys and values; tokens from or to the null block are passed over.
    """
    moves = step.once("archive moves", lambda: moves_of(step))
    if not len(moves.slots):
        return
    old_key, old_value = load_recent(cache.recent, moves.old)
    archive_slots(
        cache.pages,
        torch.cat([old_key, tokens.key[moves.new]]),
        torch.cat([old_value, tokens.value[moves.new]]),
        moves.slots,
        moves.positions,
        cache.codec,
    )


def moves_of(step: StepPlan) -> Moves:
    """The tokens that leave the window in a step, and where they are."""
    plan = step.layer
    computed = step.lengths - step.query_start.diff()
    sequence, position = ranges(step.starts, plan.policy.boundaries(step.lengths))
    is_new = position >= computed[sequence]
    slots = table_slots(step.archive_table, sequence, position, plan.archive_block)
    sources = table_slots(step.recent_table, sequence, position, plan.raw_block)
    keep = (slots >= 0) & (is_new | (sources >= 0))
    from_old, from_new = ~is_new & keep, is_new & keep
    new = (step.query_start[sequence] + position - computed[sequence])[from_new]
    slots, position = (torch.cat([x[from_old], x[from_new]]) for x in (slots, position))
    return Moves(sources[from_old], new, slots, position)


def archive_slots(
    pages: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    codec: LayerCodec,
) -> None:
    """Encode tokens and write them into archive pages.

    Args:
        pages: (blocks, kv_heads, head_bytes) uint8.
        key, value: (tokens, kv_heads, head_dim) in the model's dtype.
        slots: (tokens,) int64; -1 leaves the cache untouched.
        positions: (tokens,) in their sequences.
    """
    layout = codec.layout
    keep = slots >= 0
    slots = slots[keep]
    block, offset = slots // layout.block_size, slots % layout.block_size
    for which, x, scales_at in (("k", key, layout.k_scales), ("v", value, layout.v_scales)):
        codes, scales = codec.encode(x[keep], which, positions[keep])
        layout.store_codes(pages, which, block, offset, codes)
        if scales_at.width:
            layout.scales(pages, scales_at)[block, :, offset] = scales
