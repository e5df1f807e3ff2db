"""Merge the chunks of every sequence, rotate V's components back, add the new token."""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvpca.ops.attend.products import capped, fold, unfold
from vllm_kvpca.ops.dependent_launch import wait_for_previous
from vllm_kvpca.ops.narrow import narrow


@triton.jit
def _merge_chunks(
    sums_ptr, maxima_ptr, weights_ptr, first, count, kv_heads, head, row, in_group, column,
    DROPPED: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, MERGED: tl.constexpr,
    WIDTH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """(sums (MERGED, WIDTH), maxima and weights (MERGED,)) over chunks [first, first + count).

    Without a chunk: zeros and -inf.
    """
    # Every lane of STEP merges chunks of its own; the lanes come together once, at the end.
    total = tl.zeros((STEP, MERGED, WIDTH), tl.float32)
    top = tl.full((STEP, MERGED), float("-inf"), tl.float32)
    weight = tl.zeros((STEP, MERGED), tl.float32)
    stored = column < DIM
    for run in tl.static_range(len(DROPPED)):
        stored = stored & ((column < DROPPED[run][0]) | (column >= DROPPED[run][1]))
    for c in tl.range(0, count, STEP, num_stages=3):
        chunk = c + tl.arange(0, STEP)
        slot = ((first + chunk) * kv_heads + head).to(tl.int64)
        at = slot[:, None] * ROWS + row[None, :]
        valid = (chunk < count)[:, None] & in_group[None, :]
        m = tl.load(maxima_ptr + at, valid, other=float("-inf"))
        part = tl.load(weights_ptr + at, valid, other=0.0)
        x = tl.load(sums_ptr + at[:, :, None] * DIM + column[None, None, :],
                    valid[:, :, None] & stored[None, None, :], other=0.0)  # fmt: skip
        new_top = tl.maximum(top, m)
        safe = _finite(new_top)
        scale = tl.exp2(m - safe)
        fade = tl.exp2(top - safe)
        total = total * fade[:, :, None] + x * scale[:, :, None]
        weight = weight * fade + part * scale
        top = new_top
    highest = tl.max(top, 0)
    scale = tl.exp2(top - _finite(highest)[None, :])
    return tl.sum(total * scale[:, :, None], 0), highest, tl.sum(weight * scale, 0)


@triton.jit
def _finite(top):
    """Tops of lanes and rows without a chunk are -inf: keep inf - inf out of the powers."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def merge_kernel(
    query, key, value, out, basis, lengths, spans, kv_heads,
    sums_ptr, maxima_ptr, weights_ptr, score_scale, soft_cap,
    q_stride_b, q_stride_h, k_stride_b, k_stride_h, v_stride_b, v_stride_h,
    o_stride_b, o_stride_h, b_stride_h, b_stride_d, b_stride_c,
    DROPPED: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, MERGED: tl.constexpr,
    DIM: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr, SPAN_FIELDS: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BASIS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Grid (batch, kv_heads, ceil(GROUP / MERGED)): MERGED query heads at a time, 1 or ROWS.

    Args:
        basis: (kv_heads, DIM, DIM) float32, V's, any strides; WIDTH is DIM as a power of two.
        spans: see chunks.
        STEP: chunks read at a time. DROPPED: columns that no chunk has written.
    """
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.program_id(2) * MERGED + tl.arange(0, MERGED)
    in_group = row < GROUP
    column = tl.arange(0, WIDTH)
    s64 = sequence.to(tl.int64)
    h64 = head.to(tl.int64)
    q_head = h64 * GROUP + row
    mask = in_group[:, None] & (column < DIM)[None, :]

    # All that does not come from the split programs is read while they still run.
    length = tl.load(lengths + sequence)
    span = spans + sequence * SPAN_FIELDS
    a_first = tl.load(span)
    a_count = tl.load(span + 1)
    r_first = tl.load(span + 2)
    r_count = tl.load(span + 3)
    q = tl.load(query + s64 * q_stride_b + q_head[:, None] * q_stride_h + column[None, :],
                mask, other=0.0).to(tl.float32)  # fmt: skip
    k = tl.load(key + s64 * k_stride_b + h64 * k_stride_h + column, column < DIM, other=0.0)
    v = tl.load(value + s64 * v_stride_b + h64 * v_stride_h + column, column < DIM, other=0.0)
    if HAS_BASIS:
        at = basis + h64 * b_stride_h + column[None, :] * b_stride_d + column[:, None] * b_stride_c
        b = tl.load(at, (column < DIM)[:, None] & (column < DIM)[None, :], other=0.0)
    score = tl.sum(q * k.to(tl.float32)[None, :], 1)
    score = capped(score * score_scale, soft_cap, HAS_CAP)
    wait_for_previous(OVERLAP)

    out_at = out + s64 * o_stride_b + q_head[:, None] * o_stride_h + column[None, :]
    if length == 0:
        tl.store(out_at, tl.zeros((MERGED, WIDTH), out.dtype.element_ty), mask)
        return

    components, a_top, a_weight = _merge_chunks(
        sums_ptr, maxima_ptr, weights_ptr, a_first, a_count, kv_heads, head, row, in_group, column,
        DROPPED, DIM, ROWS, MERGED, WIDTH, STEP,
    )  # fmt: skip
    r_sums, r_top, r_weight = _merge_chunks(
        sums_ptr, maxima_ptr, weights_ptr, r_first, r_count, kv_heads, head, row, in_group, column,
        (), DIM, ROWS, MERGED, WIDTH, STEP,
    )  # fmt: skip

    top = tl.maximum(tl.maximum(a_top, r_top), score)
    a_scale = tl.exp2(a_top - top)
    r_scale = tl.exp2(r_top - top)
    n_scale = tl.exp2(score - top)
    norm = 1 / (a_weight * a_scale + r_weight * r_scale + n_scale)
    result = r_sums * (r_scale * norm)[:, None]
    result += (n_scale * norm)[:, None] * v.to(tl.float32)[None, :]
    components = components * (a_scale * norm)[:, None]
    if HAS_BASIS:
        if MERGED == 1:
            result += tl.sum(tl.reshape(components, (WIDTH, 1)) * b, 0)[None, :]
        else:
            components = unfold(components, MERGED)
            rotated = tl.dot(components, b, input_precision=PRECISION)
            if MERGED == 8:  # rows 8 to 15 are rows 0 to 7 once more
                rotated = fold(rotated, MERGED) * 0.5
            result += rotated
    else:
        result += components
    tl.store(out_at, narrow(result, out.dtype.element_ty), mask)
