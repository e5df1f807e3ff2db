"""Store: raw K and V of new tokens into recent pages."""
# Triton reads annotations of kernel parameters, so only tl.constexpr is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvpca.ops.band_table import check_last_dim
from vllm_kvpca.ops.dependent_launch import follow_previous, launch_options, overlaps
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens

TILE_ROWS = 8
"""(token, head) pairs of one program: 4 KiB of K and V with head_dim 128."""


def store(step: StepPlan, tokens: StepTokens, cache: LayerCache) -> None:
    """Write the step's raw K and V into recent pages; see `reference.store`.

    Keys and values may be views of a fused qkv tensor.
    """
    recent, key, value, slots = cache.recent, tokens.key, tokens.value, step.slots
    check_last_dim(recent=recent, key=key, value=value)
    rows, heads, head_dim = key.shape
    grid = (triton.cdiv(rows * heads, TILE_ROWS),)
    if not rows:
        return
    _store_kernel[grid](
        recent,
        key,
        value,
        slots,
        rows * heads,
        *recent.stride()[:3],
        *key.stride()[:2],
        *value.stride()[:2],
        HEADS=heads,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        RAW_BLOCK=step.layer.raw_block,
        ROWS=TILE_ROWS,
        OVERLAP=overlaps(),
        **launch_options(overlaps()),
    )


# The number of rows changes with every step: specializing on it would compile anew.
@triton.jit(do_not_specialize=["num_rows"])
def _store_kernel(
    recent,
    key,
    value,
    slots,
    num_rows,
    recent_block_stride,
    recent_head_stride,
    recent_token_stride,
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    RAW_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Copy ROWS (token, head) pairs; the heads of a token lie side by side in K and V.

    Byte map of one token and head in a recent page, with 2-byte elements e:

        | K e0 .. e[head_dim - 1] | V e0 .. e[head_dim - 1] |
        0                         2 * head_dim              4 * head_dim
    """
    follow_previous(OVERLAP)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token, head = row // HEADS, row % HEADS
    slot = tl.load(slots + token, mask=row < num_rows, other=-1).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = (slot >= RAW_BLOCK)[:, None] & (column < HEAD_DIM)[None, :]

    key_row = token * key_token_stride + head * key_head_stride
    value_row = token * value_token_stride + head * value_head_stride
    k = tl.load(key + key_row[:, None] + column[None, :], mask=mask)
    v = tl.load(value + value_row[:, None] + column[None, :], mask=mask)

    target = (slot // RAW_BLOCK) * recent_block_stride + head * recent_head_stride
    target += (slot % RAW_BLOCK) * recent_token_stride
    target_ptrs = recent + target[:, None] + column[None, :]
    tl.store(target_ptrs, k.to(recent.dtype.element_ty), mask=mask)
    tl.store(target_ptrs + HEAD_DIM, v.to(recent.dtype.element_ty), mask=mask)
