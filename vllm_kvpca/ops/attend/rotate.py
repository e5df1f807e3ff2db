"""Queries of decoding sequences in K's component space, one product with the basis per head."""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvpca.ops.dependent_launch import launch_next, wait_for_previous


@triton.jit(do_not_specialize=["rows"])
def rotate_kernel(
    query, basis, rotated, rows,
    q_stride_b, q_stride_h, r_stride_g, r_stride_row, b_stride_h, b_stride_d, b_stride_c,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    MADE: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(rows / ROWS), kv_heads, ceil(MADE / COLUMNS)).

    Args:
        query: (batch, heads, DIM) in the model's dtype.
        basis: (kv_heads, DIM, MADE) float32, K's and what else queries are multiplied with, any
            strides; WIDTH is DIM as a power of two.
        rotated: (kv_heads, rows, MADE) float32; rows are those of one sequence after the other.
        rows: batch * GROUP.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    head = tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, WIDTH)
    q_at = (row // GROUP).to(tl.int64) * q_stride_b + (head * GROUP + row % GROUP) * q_stride_h
    q = tl.load(query + q_at[:, None] + d[None, :], (row < rows)[:, None] & (d < DIM)[None, :],
                other=0.0)  # fmt: skip
    b_at = basis + head * b_stride_h + d[:, None] * b_stride_d + column[None, :] * b_stride_c
    b = tl.load(b_at, (d < DIM)[:, None] & (column < MADE)[None, :], other=0.0)
    out = tl.dot(q.to(tl.float32), b, input_precision=PRECISION)
    out_at = rotated + head * r_stride_g + row.to(tl.int64)[:, None] * r_stride_row
    tl.store(out_at + column[None, :], out, (row < rows)[:, None] & (column < MADE)[None, :])
    # Queries, basis and buffer have nothing to do with the kernel before this one, but the one
    # after this needs what that one writes.
    wait_for_previous(OVERLAP)
    launch_next(OVERLAP)
