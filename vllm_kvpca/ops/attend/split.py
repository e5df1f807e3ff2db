"""Split-KV programs: attention of one KV head's query rows over one chunk of tokens.

What a program reads of token t of an archive page (one head, N tokens, k8v4, head_dim D):

    K codes    at               k_at + t * D                     D bytes of int8
    V codes    at N * D       = v_at + t // 8 * (8 * D/2)        two nibbles a byte; byte c of
                                     + c * 8 + t % 8             a token, 8 tokens together
    K scale    at N * 3D/2    = ks_at + t * 2                    bf16, on the token's score
    V scale    at N * 3D/2+2N = vs_at + t * 2                    bf16, on the token's weight

Both products take codes as int8: scores sum over a token's components, which lie together,
outputs over tokens, of which 8 lie together (products). Weights are quantized relative to
the largest weight of their tile, so that small tiles lose nothing to large ones.

Where K is archived without its bias (codec.key_bias), a row of queries is DIM components, then DIM
numbers that make, with the angles of a run of RUN tokens, what the bias adds to all scores of that
run. A tile lies in one run.

A token of a recent page is one row, K then V, in the model's dtype, and both products are.

A tile of tokens may reach into a second block, never a third: `page` and `token` of the functions
below say for each token where its block's page begins and where in the block it is.
"""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvpca.ops.attend.products import (
    HI,
    LEVELS,
    NIBBLE_UNIT,
    capped,
    fold,
    int_product,
    nibbles,
    permuted_tokens,
    product_order,
    stacked,
    two_terms,
    unfold,
)
from vllm_kvpca.ops.dependent_launch import launch_next, wait_for_previous


@triton.jit
def _query_rows(query, stride, column, WIDTH, PADDED: tl.constexpr, GROUP: tl.constexpr,
                ROWS: tl.constexpr):  # fmt: skip
    """(ROWS, PADDED) float32, zero past the group and the width."""
    row = tl.arange(0, ROWS)
    j = tl.arange(0, PADDED)
    mask = (row < GROUP)[:, None] & (j < WIDTH)[None, :]
    at = row[:, None] * stride + column + j[None, :]
    return tl.load(query + at, mask, other=0.0).to(tl.float32)


@triton.jit
def _bias_scores(turning, angles, t, RUN: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """(ROWS,) products of queries with the bias at the run of token t; turning is (ROWS, WIDTH)."""
    j = tl.arange(0, WIDTH)
    of_run = tl.load(angles + (t // RUN).to(tl.int64) * DIM + j, j < DIM, other=0.0)
    return tl.sum(turning * of_run[None, :], 1)


@triton.jit
def _prepare(query, stride, score_scale, K: tl.constexpr, DTYPE: tl.constexpr,
             GROUP: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    """Per product with K: (terms or values (16, padded), factor (ROWS, 1) that makes scores)."""
    out = ()
    for k in tl.static_range(len(K)):
        for half in tl.static_range(2 if K[k][0] == 4 else 1):
            q = _query_rows(query, stride, K[k][5 + half], K[k][3], K[k][4], GROUP, ROWS)
            if K[k][0] == 16:
                factor = tl.full((ROWS, 1), 1.0, tl.float32) * score_scale
                if ROWS == 8:
                    q = stacked(q, tl.zeros_like(q))
                out = out + ((q.to(DTYPE), q.to(DTYPE), factor),)
            else:
                largest = tl.max(tl.abs(q), 1)
                largest = tl.where(largest > 0, largest, 1.0)
                hi, lo = two_terms(q * (1 / largest * LEVELS)[:, None])
                unit = 1.0 / (LEVELS * HI * (NIBBLE_UNIT if K[k][0] == 4 else 1))
                factor = (largest * score_scale)[:, None] * unit
                if ROWS == 8:
                    both = stacked(hi, lo)
                    out = out + ((both, both, factor),)
                else:
                    out = out + ((hi, lo, factor),)
    return out


@triton.jit
def _locate(cache, block_stride, table, t, n, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """(page, token) of tokens t + n; those past the end are somewhere in the same pages."""
    row = t // BLOCK
    page = cache + tl.load(table + row).to(tl.int64) * block_stride
    token = t % BLOCK + n
    if BLOCK % TILE != 0:
        inside = (row + 1) * BLOCK < end
        block = tl.load(table + row + 1, inside, other=0).to(tl.int64)
        second = tl.where(inside, cache + block * block_stride, page)
        page = tl.where(token < BLOCK, page, second)
        token = tl.where(token < BLOCK, token, token - BLOCK)
    return tl.multiple_of(page, 16), token


@triton.jit
def _k_codes(page, token, STEP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
             KIND: tl.constexpr):  # fmt: skip
    """(tokens, PADDED) codes, zero past the width. Tokens past the sequence's end are read as
    they are: their scores are masked."""
    j = tl.arange(0, PADDED)[None, :]
    at = (page + token * STEP).to(tl.pointer_type(KIND))[:, None] + j
    if WIDTH == PADDED:
        return tl.load(at)
    else:
        return tl.load(at, j < WIDTH, other=0)


@triton.jit
def _scales(page, token, valid, STEP: tl.constexpr):
    pointer = (page + token * STEP).to(tl.pointer_type(tl.bfloat16))
    return tl.load(pointer, valid, other=0.0).to(tl.float32)


@triton.jit
def _scores(q, page, token, valid, AT: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr,
            ROWS: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """(ROWS, tokens) scaled products of the queries with K."""
    total = 0.0
    for k in tl.static_range(len(K)):
        piece = page + (AT[1] + K[k][1])
        first = q[K[k][7]]
        if K[k][0] == 16:
            codes = tl.trans(_k_codes(piece, token, AT[2], K[k][3], K[k][4], DTYPE))
            if INTERPRET:
                s = tl.dot(first[0].to(tl.float32), codes.to(tl.float32), input_precision="ieee")
            else:
                s = tl.dot(first[0], codes)
            total += fold(s, ROWS) * first[2]
        else:
            codes = _k_codes(piece, token, AT[2], K[k][3], K[k][4], tl.uint8)
            if K[k][0] == 8:
                codes = tl.trans(codes.to(tl.int8, bitcast=True))
                s = int_product(first, codes, ROWS) * first[2]
            else:
                second = q[K[k][7] + 1]
                low, high = nibbles(codes, INTERPRET)
                s = int_product(first, tl.trans(low), ROWS) * first[2]
                s += int_product(second, tl.trans(high), ROWS) * second[2]
            total += s * _scales(page + (AT[5] + 2 * K[k][2]), token, valid, AT[6])[None, :]
    return total


@triton.jit
def _v_codes(page, token, valid, AT: tl.constexpr, V: tl.constexpr, INDEX: tl.constexpr,
             TILE: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """(tokens, width) codes of piece INDEX of V; values (16 bits) are zero where not valid,
    codes are whatever the page holds: their weights are zero.

    `token` is the first of those that lie together.
    """
    WIDTH: tl.constexpr = V[INDEX][3]
    TOGETHER: tl.constexpr = AT[9]
    j = tl.arange(0, V[INDEX][5])
    run = page + token * AT[4] + (AT[3] + V[INDEX][1] * TOGETHER)
    run = run.to(tl.pointer_type(KIND))
    if TOGETHER == 1:
        return tl.load(run[:, None] + j[None, :], valid[:, None], other=0.0)
    else:
        at = run[None, :] + (tl.arange(0, TILE) % TOGETHER)[None, :] + (j * TOGETHER)[:, None]
        if V[INDEX][5] == WIDTH:  # noqa: SIM108
            codes = tl.load(at)
        else:
            codes = tl.load(at, (j < WIDTH)[:, None], other=0)
        if KIND.primitive_bitwidth == 16:  # a mask by token would part what lies together
            codes = tl.where(valid[None, :], codes, 0.0)
        return tl.trans(codes)


@triton.jit
def _add_values(sums, p, fade, page, token, v_page, v_token, valid, AT: tl.constexpr,
                V: tl.constexpr, TILE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
                PERMUTED: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """sums * fade + weights (ROWS, tokens) times V, piece by piece.

    Pieces of one band follow one another and share its quantized weights. Weights are in the
    order of `token`, perhaps permuted; codes never.
    """
    out = ()
    high = None  # of the nibbles last loaded
    for v in tl.static_range(len(V)):
        if V[v][0] == 16:
            values = _v_codes(v_page, v_token, valid, AT, V, v, TILE, DTYPE)
            weights = unfold(p, ROWS)
            faded = sums[v] * unfold(fade[:, None], ROWS)
            if INTERPRET:
                x = tl.dot(weights, values.to(tl.float32), faded, input_precision="ieee")
            else:
                x = tl.dot(weights.to(DTYPE), values, faded)
            out = out + (x,)
        else:
            if v == 0 or V[v][2] != V[v - 1][2] or V[v - 1][0] == 16:
                w = p * _scales(page + (AT[7] + 2 * V[v][2]), token, valid, AT[8])[None, :]
                largest = tl.maximum(tl.max(tl.abs(w), 1), 1e-30)  # scales may be negative
                hi, lo = two_terms(w * (1 / largest * LEVELS)[:, None])
                if ROWS == 8:
                    hi = stacked(hi, lo)
                if PERMUTED:
                    hi = product_order(hi, TILE)
                    lo = product_order(lo, TILE)
                unit = largest * (1.0 / (LEVELS * HI))
            if V[v][0] == -4:
                x = int_product((hi, lo), high, ROWS)
                factor = unit * (1.0 / NIBBLE_UNIT)
            else:
                codes = _v_codes(v_page, v_token, valid, AT, V, v, TILE, tl.uint8)
                if V[v][0] == 4:
                    low, high = nibbles(codes, INTERPRET)
                    x = int_product((hi, lo), low, ROWS)
                    factor = unit * (1.0 / NIBBLE_UNIT)
                else:
                    x = int_product((hi, lo), codes.to(tl.int8, bitcast=True), ROWS)
                    factor = unit
            out = out + (sums[v] * fade[:, None] + x * factor[:, None],)
    return out


@triton.jit
def _no_sums(BITS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Products of values have both halves of the rows, products of codes are folded."""
    if BITS == 16:
        return tl.zeros((16, WIDTH), tl.float32)
    else:
        return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def _attend(
    query, q_stride, cache, block_stride, table, first, last, begin, end, score_scale, soft_cap,
    sums_ptr, maxima_ptr, weights_ptr, angles,
    AT: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
    PERMUTED: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, HAS_CAP: tl.constexpr, INTERPRET: tl.constexpr, RUN: tl.constexpr,
    LATE: tl.constexpr,
):  # fmt: skip
    """Attention over the tokens of [begin, end) in tiles [first, last), into the workspace.

    angles: of the bias that was taken out of K, see BiasTables; None if none was.
    LATE: let the merge be launched after the last tile.
    """
    q = _prepare(query, q_stride, score_scale, K, DTYPE, GROUP, ROWS)
    sums = ()
    for v in tl.static_range(len(V)):
        sums = sums + (_no_sums(V[v][0], V[v][5], ROWS),)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    n = permuted_tokens(TILE) if PERMUTED else tl.arange(0, TILE)
    first_together = tl.arange(0, TILE) // AT[9] * AT[9]
    if angles is not None:
        TURNING: tl.constexpr = triton.next_power_of_2(DIM)
        turning = _query_rows(query, q_stride, DIM, DIM, TURNING, GROUP, ROWS) * score_scale
        bias = _bias_scores(turning, angles, first * TILE, RUN, DIM, TURNING)
    for i in range(first, last):
        t = i * TILE
        valid = t + n < end
        if AT[9] == 1:  # an archive begins at 0
            valid = valid & (t + n >= begin)
        page, token = _locate(cache, block_stride, table, t, n, end, AT[0], TILE)
        v_page, v_token = _locate(cache, block_stride, table, t, first_together, end, AT[0], TILE)
        s = _scores(q, page, token, valid, AT, K, DTYPE, ROWS, INTERPRET)
        if angles is not None:
            if t % RUN == 0:
                bias = _bias_scores(turning, angles, t, RUN, DIM, TURNING)
            s += bias[:, None]
        s = capped(s, soft_cap, HAS_CAP)
        s = tl.where(valid[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        sums = _add_values(sums, p, fade, page, token, v_page, v_token, valid, AT, V, TILE, DTYPE,
                           ROWS, PERMUTED, INTERPRET)  # fmt: skip
        top = new_top
    launch_next(LATE)
    for v in tl.static_range(len(V)):
        row = tl.arange(0, sums[v].shape[0])
        column = tl.arange(0, V[v][5])
        at = sums_ptr + row[:, None] * DIM + (V[v][4] + column)[None, :]
        tl.store(at, sums[v], (row < GROUP)[:, None] & (column < V[v][3])[None, :])
    rows = tl.arange(0, ROWS)
    tl.store(maxima_ptr + rows, top)
    tl.store(weights_ptr + rows, weight)


@triton.jit(do_not_specialize=["rt_stride", "at_stride"])
def split_kernel(
    query, rotated, recent, pages, recent_table, archive_table, chunks, angles,
    sums_ptr, maxima_ptr, weights_ptr, score_scale, soft_cap,
    q_stride_b, q_stride_h, a_stride_b, a_stride_g, a_stride_h,
    r_stride_b, r_stride_h, p_stride_b, p_stride_h, rt_stride, at_stride,
    A_AT: tl.constexpr, A_K: tl.constexpr, A_V: tl.constexpr, A_TILE: tl.constexpr,
    A_PERMUTED: tl.constexpr, R_AT: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr,
    R_TILE: tl.constexpr, CHUNK_FIELDS: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, HAS_CAP: tl.constexpr,
    INTERPRET: tl.constexpr, RUN: tl.constexpr, OVERLAP: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Grid (kv_heads, capacity of `chunks`). Programs of empty chunks return at once.

    Args:
        query: (batch, heads, DIM); rotated: the same for archived K, other strides.
        angles: see `_attend`.
        recent, pages: bytes; strides in bytes. Tables: int32, their rows' strides.
        chunks: see chunks. score_scale: softmax scale, times log2(e) without cap.
        A_*, R_*: `Part` of the archive and of the recent pages, and tokens at a time.
        EARLY: let the merge be launched at once, or when a program has attended; see `launches`.
    """
    wait_for_previous(OVERLAP)
    launch_next(OVERLAP and EARLY)
    head = tl.program_id(0)
    chunk = chunks + tl.program_id(1) * CHUNK_FIELDS
    first = tl.load(chunk + 1)
    last = tl.load(chunk + 2)
    if first >= last:
        return
    which = tl.load(chunk)
    begin = tl.load(chunk + 3)
    end = tl.load(chunk + 4)
    slot = (tl.program_id(1) * tl.num_programs(0) + head).to(tl.int64)
    sums_ptr += slot * ROWS * DIM
    maxima_ptr += slot * ROWS
    weights_ptr += slot * ROWS
    row = (which // 2).to(tl.int64)
    if which % 2 == 0:
        _attend(
            rotated + row * a_stride_b + head.to(tl.int64) * a_stride_g, a_stride_h,
            pages + head.to(tl.int64) * p_stride_h, p_stride_b, archive_table + row * at_stride,
            first, last, begin, end, score_scale, soft_cap, sums_ptr, maxima_ptr, weights_ptr,
            angles, A_AT, A_K, A_V, A_TILE, A_PERMUTED, DTYPE, GROUP, ROWS, DIM, HAS_CAP, INTERPRET,
            RUN, OVERLAP and not EARLY,
        )  # fmt: skip
    else:
        _attend(
            query + row * q_stride_b + head.to(tl.int64) * GROUP * q_stride_h, q_stride_h,
            recent + head.to(tl.int64) * r_stride_h, r_stride_b, recent_table + row * rt_stride,
            first, last, begin, end, score_scale, soft_cap, sums_ptr, maxima_ptr, weights_ptr,
            None, R_AT, R_K, R_V, R_TILE, False, DTYPE, GROUP, ROWS, DIM, HAS_CAP, INTERPRET,
            RUN, OVERLAP and not EARLY,
        )  # fmt: skip
