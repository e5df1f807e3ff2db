"""Store: raw K and V of new tokens into recent pages."""
# Triton reads annotations of kernel parameters, so only tl.constexpr is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvpca.ops.band_table import check_last_dim
from vllm_kvpca.ops.dependent_launch import follow_previous, launch_options, overlaps

TILE_ROWS = 8
"""(token, head) pairs of one program: 4 KiB of K and V with head_dim 128."""


def store(
    recent: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write raw tokens into recent pages; the reference is `reference.store`.

    Args:
        recent: (blocks, kv_heads, raw_block, 2 * head_dim) in the model's dtype.
        key, value: (tokens, kv_heads, head_dim); may be views of a fused qkv tensor.
        slots: (tokens,) int32 or int64; one in the null block 0 (or below) is nowhere: vLLM maps
            tokens without a raw block there.
    """
    check_last_dim(recent=recent, key=key, value=value)
    tokens, heads, head_dim = key.shape
    grid = (triton.cdiv(tokens * heads, TILE_ROWS),)
    if not tokens:
        return
    _store_kernel[grid](
        recent,
        key,
        value,
        slots,
        tokens * heads,
        *recent.stride()[:3],
        *key.stride()[:2],
        *value.stride()[:2],
        HEADS=heads,
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        RAW_BLOCK=recent.shape[2],
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
