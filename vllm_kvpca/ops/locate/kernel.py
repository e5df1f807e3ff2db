"""Where each sequence's archived part ends, found on the device, and which sequences archive.

One program per sequence reads its block-table row from the boundary on until it meets a block that
is not null: as a rule that is the first one it looks at (pages.step_plan has the definition).
"""
# Triton reads annotations of kernel parameters, so only tl.constexpr is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvpca.pages.layer_plan import LayerPlan

ROWS = 64
"""Rows of a block table that are looked at together."""
LISTED = 256
"""Sequences that are looked at together."""


def locate(
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    recent_table: torch.Tensor,
    plan: LayerPlan,
    starts: torch.Tensor,
    busy: torch.Tensor,
) -> None:
    """Where each sequence's archived part ends before the step, and which of them archive; see
    `reference.locate`."""
    policy = plan.policy
    thresholds = {
        "AFTER": policy.compress_after,
        "RECENT": policy.keep_recent,
        "ALIGN": policy.align,
    }
    _starts[(len(lengths),)](
        query_start,
        lengths,
        recent_table,
        recent_table.stride(0),
        starts,
        RAW_BLOCK=plan.raw_block,
        ROWS=ROWS,
        num_warps=1,
        **thresholds,
    )
    _list_busy[(1,)](starts, lengths, busy, len(lengths), WIDTH=LISTED, **thresholds)


@triton.jit
def boundary(n, AFTER: tl.constexpr, RECENT: tl.constexpr, ALIGN: tl.constexpr):
    """pages.boundary.boundary on the device."""
    archived = tl.maximum(n - RECENT, 0) // ALIGN * ALIGN
    return tl.where(n > AFTER, archived, 0)


# Slices of a batch's tensors start anywhere, and tables have any width: specializing on that
# would compile anew.
@triton.jit(do_not_specialize=["query_start", "lengths", "table", "table_stride", "out"])
def _starts(
    query_start,
    lengths,
    table,
    table_stride,
    out,
    RAW_BLOCK: tl.constexpr,
    AFTER: tl.constexpr,
    RECENT: tl.constexpr,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
):
    sequence = tl.program_id(0)
    new = tl.load(query_start + sequence + 1) - tl.load(query_start + sequence)
    computed = tl.maximum(tl.load(lengths + sequence) - new, 0)
    rows = tl.cdiv(computed, RAW_BLOCK)
    row = boundary(computed, AFTER, RECENT, ALIGN) // RAW_BLOCK
    null = table + sequence.to(tl.int64) * table_stride
    offset = tl.arange(0, ROWS)
    searching = row < rows
    while searching:
        at = row + offset
        block = tl.load(null + at, mask=at < rows, other=1)
        # Rows past the end count as found: other=1 is no null block.
        first = tl.min(tl.where(block != 0, offset, ROWS), 0)
        row += first
        searching = (first == ROWS) & (row < rows)
    tl.store(out + sequence, tl.minimum(computed, tl.cdiv(row * RAW_BLOCK, ALIGN) * ALIGN))


@triton.jit(do_not_specialize=["starts", "lengths", "out", "batch"])
def _list_busy(
    starts,
    lengths,
    out,
    batch,
    AFTER: tl.constexpr,
    RECENT: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    count = 0
    for first in range(0, batch, WIDTH):
        sequence = first + tl.arange(0, WIDTH)
        inside = sequence < batch
        start = tl.load(starts + sequence, inside, other=0)
        length = tl.load(lengths + sequence, inside, other=0)
        busy = (inside & (boundary(length, AFTER, RECENT, ALIGN) > start)).to(tl.int32)
        place = count + tl.cumsum(busy)
        tl.store(out + place, sequence, busy > 0)
        count += tl.sum(busy)
    tl.store(out, count)
