"""Split-KV programs: attention of one KV head's query rows over one chunk of tokens.

What a program reads of token t of an archive page (one head, N tokens, k8v4, head_dim D):

    K codes    at               k_at + t * D                     D bytes of int8
    V codes    at N * D       = v_at + t // 8 * (8 * D/2)        two nibbles a byte; byte c of
                                     + c * 8 + t % 8             a token, 8 tokens together
    K scale    at N * 3D/2    = ks_at + t * 2                    bf16, on the token's score
    V scale    at N * 3D/2+2N = vs_at + t * 2                    bf16, on the token's weight

Both products take codes as int8: scores sum over a token's components, which lie together,
outputs over tokens, of which 8 lie together (decode_ops). Weights are quantized relative to
the largest weight of their tile, so that small tiles lose nothing to large ones.

A token of a recent page is one row, K then V, in the model's dtype, and both products are.
"""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvpca.kernels.decode_ops import (
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
def _k_codes(base, token, BLOCK: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
             WIDTH: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """(tokens, PADDED) codes, zero past the width. Tokens past the sequence's end are read as
    they are, if the page has them: their scores are masked."""
    j = tl.arange(0, PADDED)[None, :]
    at = base + token[:, None] * STEP + j
    if BLOCK % TILE == 0:
        if WIDTH == PADDED:
            return tl.load(at)
        else:
            return tl.load(at, j < WIDTH, other=0)
    else:
        return tl.load(at, (token < BLOCK)[:, None] & (j < WIDTH), other=0)


@triton.jit
def _scales(base, token, valid):
    pointer = base.to(tl.pointer_type(tl.bfloat16)) + token
    return tl.load(pointer, valid, other=0.0).to(tl.float32)


@triton.jit
def _scores(q, base, token, valid, AT: tl.constexpr, K: tl.constexpr, TILE: tl.constexpr,
            DTYPE: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """(ROWS, tokens) scaled products of the queries with K."""
    total = 0.0
    for k in tl.static_range(len(K)):
        piece = base + (AT[1] + K[k][1])
        first = q[K[k][7]]
        if K[k][0] == 16:
            at = piece.to(tl.pointer_type(DTYPE))
            codes = tl.trans(_k_codes(at, token, AT[0], TILE, AT[2] // 2, K[k][3], K[k][4]))
            if INTERPRET:
                s = tl.dot(first[0].to(tl.float32), codes.to(tl.float32), input_precision="ieee")
            else:
                s = tl.dot(first[0], codes)
            total += fold(s, ROWS) * first[2]
        else:
            codes = _k_codes(piece, token, AT[0], TILE, AT[2], K[k][3], K[k][4])
            if K[k][0] == 8:
                codes = tl.trans(codes.to(tl.int8, bitcast=True))
                s = int_product(first, codes, ROWS) * first[2]
            else:
                second = q[K[k][7] + 1]
                low, high = nibbles(codes, INTERPRET)
                s = int_product(first, tl.trans(low), ROWS) * first[2]
                s += int_product(second, tl.trans(high), ROWS) * second[2]
            total += s * _scales(base + (AT[5] + 2 * K[k][2]), token * (AT[6] // 2), valid)[None, :]
    return total


@triton.jit
def _v_codes(base, t, valid, AT: tl.constexpr, V: tl.constexpr, INDEX: tl.constexpr,
             TILE: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """(tokens, width) codes of piece INDEX of V, from token t on; values (16 bits) are zero
    where not valid, codes are whatever the page holds: their weights are zero."""
    WIDTH: tl.constexpr = V[INDEX][3]
    j = tl.arange(0, V[INDEX][5])
    n = tl.arange(0, TILE)
    TOGETHER: tl.constexpr = AT[9]
    if TOGETHER == 1:
        at = base + (AT[3] + V[INDEX][1]) + (t + n) * AT[4]
        at = at.to(tl.pointer_type(DTYPE))[:, None] + j[None, :]
        return tl.load(at, valid[:, None], other=0.0)
    else:
        SIZE: tl.constexpr = 2 if V[INDEX][0] == 16 else 1
        KIND: tl.constexpr = DTYPE if V[INDEX][0] == 16 else tl.uint8
        run = base + t * AT[4] + (AT[3] + V[INDEX][1] * TOGETHER)
        group = n // TOGETHER * (TOGETHER * AT[4] // SIZE) + n % TOGETHER
        at = run.to(tl.pointer_type(KIND)) + j[:, None] * TOGETHER + group[None, :]
        if V[INDEX][0] == 16:
            codes = tl.load(at, valid[None, :] & (j < WIDTH)[:, None], other=0.0)
        elif AT[0] % TILE == 0 and V[INDEX][5] == WIDTH:
            codes = tl.load(at)
        else:  # whole groups, so that one mask covers one load
            exists = (t + n // TOGETHER * TOGETHER < AT[0])[None, :] & (j < WIDTH)[:, None]
            codes = tl.load(at, exists, other=0)
        return tl.trans(codes)


@triton.jit
def _add_values(sums, p, fade, base, t, token, valid, AT: tl.constexpr, V: tl.constexpr,
                TILE: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr,
                PERMUTED: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """sums * fade + weights (ROWS, tokens) times V, piece by piece.

    Pieces of one band follow one another and share its quantized weights.
    """
    out = ()
    high = None  # of the nibbles last loaded
    for v in tl.static_range(len(V)):
        if V[v][0] == 16:
            values = _v_codes(base, t, valid, AT, V, v, TILE, DTYPE)
            weights = unfold(p, ROWS)
            faded = sums[v] * unfold(fade[:, None], ROWS)
            if INTERPRET:
                x = tl.dot(weights, values.to(tl.float32), faded, input_precision="ieee")
            else:
                x = tl.dot(weights.to(DTYPE), values, faded)
            out = out + (x,)
        else:
            if v == 0 or V[v][2] != V[v - 1][2] or V[v - 1][0] == 16:
                w = p * _scales(base + (AT[7] + 2 * V[v][2]), token * (AT[8] // 2), valid)[None, :]
                largest = tl.maximum(tl.max(w, 1), 1e-30)
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
                codes = _v_codes(base, t, valid, AT, V, v, TILE, DTYPE)
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
    sums_ptr, maxima_ptr, weights_ptr,
    AT: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
    PERMUTED: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    DIM: tl.constexpr, HAS_CAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attention over the tokens of [begin, end) in tiles [first, last), into the workspace."""
    TILES: tl.constexpr = (AT[0] + TILE - 1) // TILE
    q = _prepare(query, q_stride, score_scale, K, DTYPE, GROUP, ROWS)
    sums = ()
    for v in tl.static_range(len(V)):
        sums = sums + (_no_sums(V[v][0], V[v][5], ROWS),)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    n = tl.arange(0, TILE)
    if PERMUTED:
        n = permuted_tokens(TILE)
    for i in range(first, last):
        t = i % TILES * TILE
        block = tl.load(table + i // TILES).to(tl.int64)
        base = tl.multiple_of(cache + block * block_stride, 16)
        token = t + n
        position = i // TILES * AT[0] + token
        valid = position < end
        if AT[0] % TILE != 0:
            valid = valid & (token < AT[0])
        if AT[9] == 1:  # an archive begins at 0
            valid = valid & (position >= begin)
        s = _scores(q, base, token, valid, AT, K, TILE, DTYPE, ROWS, INTERPRET)
        s = capped(s, soft_cap, HAS_CAP)
        s = tl.where(valid[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        sums = _add_values(sums, p, fade, base, t, token, valid, AT, V, TILE, DTYPE, ROWS,
                           PERMUTED, INTERPRET)  # fmt: skip
        top = new_top
    for v in tl.static_range(len(V)):
        row = tl.arange(0, sums[v].shape[0])
        column = tl.arange(0, V[v][5])
        at = sums_ptr + row[:, None] * DIM + (V[v][4] + column)[None, :]
        tl.store(at, sums[v], (row < GROUP)[:, None] & (column < V[v][3])[None, :])
    rows = tl.arange(0, ROWS)
    tl.store(maxima_ptr + rows, top)
    tl.store(weights_ptr + rows, weight)


@triton.jit
def split_kernel(
    query, rotated, recent, pages, recent_table, archive_table, chunks,
    sums_ptr, maxima_ptr, weights_ptr, score_scale, soft_cap,
    q_stride_b, q_stride_h, a_stride_b, a_stride_g, a_stride_h,
    r_stride_b, r_stride_h, p_stride_b, p_stride_h, rt_stride, at_stride,
    A_AT: tl.constexpr, A_K: tl.constexpr, A_V: tl.constexpr, A_TILE: tl.constexpr,
    A_PERMUTED: tl.constexpr, R_AT: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr,
    R_TILE: tl.constexpr, CHUNK_FIELDS: tl.constexpr, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, HAS_CAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (kv_heads, capacity of `chunks`). Programs of empty chunks return at once.

    Args:
        query: (batch, heads, DIM); rotated: the same for archived K, other strides.
        recent, pages: bytes; strides in bytes. Tables: int32, their rows' strides.
        chunks: see decode_chunks. score_scale: softmax scale, times log2(e) without cap.
        A_*, R_*: `Part` of the archive and of the recent pages, and tokens at a time.
    """
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
            A_AT, A_K, A_V, A_TILE, A_PERMUTED, DTYPE, GROUP, ROWS, DIM, HAS_CAP, INTERPRET,
        )  # fmt: skip
    else:
        _attend(
            query + row * q_stride_b + head.to(tl.int64) * GROUP * q_stride_h, q_stride_h,
            recent + head.to(tl.int64) * r_stride_h, r_stride_b, recent_table + row * rt_stride,
            first, last, begin, end, score_scale, soft_cap, sums_ptr, maxima_ptr, weights_ptr,
            R_AT, R_K, R_V, R_TILE, False, DTYPE, GROUP, ROWS, DIM, HAS_CAP, INTERPRET,
        )  # fmt: skip
