"""Split-KV programs: attention of one KV head's query rows over one chunk of tokens.

A chunk is a run of archived or of recent tokens of one sequence. All chunks of a batch form
one list, [archive of sequence 0, 1, ... | recent of sequence 0, 1, ...], which every program
derives from `starts` and `lengths`: chunks weigh about the same (by bytes), however unequal
the sequences are, and their number depends on nothing the host does not know.

What a program reads of each token (archive page of one head, N tokens, k8v4, head_dim D):

    K codes    at               k_at + t * D        D bytes of int8: as they are into the dot
    V codes    at N * D       = v_at + t * D/2      D/2 bytes: two nibbles each, see decode_ops
    K scale    at N * 3D/2    = ks_at + t * 2       bf16, a factor on the token's score
    V scale    at N * 3D/2+2N = vs_at + t * 2       bf16, a factor on the token's weight

A recent page is the same with k_at = 0, v_at = 2 D and steps of 4 D bytes.

The query is int8 too, in two terms, q = s (hi + lo / 254), which keeps 15 bits of it. An MMA
tile has 16 rows: up to 8 query heads put hi into rows 0-7 and lo into rows 8-15, so the
second term is free; more heads take two products.
"""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvpca.kernels.decode_ops import capped, fold, int8_values, nibbles, unfold

HI = tl.constexpr(254)


@triton.jit
def chunk_lists(
    starts, lengths, batch, target, LEAST, A_COST: tl.constexpr, R_COST: tl.constexpr,
    A_TILE: tl.constexpr, R_TILE: tl.constexpr, BATCH: tl.constexpr,
):  # fmt: skip
    """Per sequence: archived tokens, tokens and number of its archive chunks, then the same
    of its recent part; six (BATCH,) int32.

    Floor division of a part's cost by the mean cost per chunk gives its number of chunks,
    so there are at most `target` of them and one more for each part.
    """
    i = tl.arange(0, BATCH)
    start = tl.load(starts + i, i < batch, other=0)
    length = tl.load(lengths + i, i < batch, other=0)
    archived = tl.where(length > 0, start, 0)
    recent = tl.where(length > 0, length - 1 - start, 0)
    cost = tl.sum(archived.to(tl.int64)) * A_COST + tl.sum(recent.to(tl.int64)) * R_COST
    quota = tl.maximum(tl.cdiv(cost, target), LEAST).to(tl.float32)
    a_size, a_count = _chunks(archived, A_COST / quota, A_TILE)
    r_size, r_count = _chunks(recent, R_COST / quota, R_TILE)
    return archived, a_size, a_count, recent, r_size, r_count


@triton.jit
def _chunks(tokens, per_token, TILE: tl.constexpr):
    count = tl.maximum((tokens.to(tl.float32) * per_token).to(tl.int32), 1)
    size = tl.maximum(tl.cdiv(tl.cdiv(tokens, count), TILE), 1) * TILE
    return size, tl.cdiv(tokens, size)


@triton.jit
def _pick(x, i, index):
    return tl.sum(tl.where(i == index, x, 0))


@triton.jit
def _find(chunk, tokens, size, count, BATCH: tl.constexpr):
    """(sequence, first token, last token + 1) of a chunk in one part's list."""
    i = tl.arange(0, BATCH)
    ends = tl.cumsum(count)
    sequence = tl.sum((ends <= chunk).to(tl.int32))
    first = (chunk - _pick(ends - count, i, sequence)) * _pick(size, i, sequence)
    last = tl.minimum(first + _pick(size, i, sequence), _pick(tokens, i, sequence))
    return sequence, first, last


@triton.jit
def _query_rows(query, stride, column, WIDTH, PADDED: tl.constexpr, GROUP: tl.constexpr,
                ROWS: tl.constexpr):  # fmt: skip
    """(16, PADDED) float32: query rows 0 to ROWS - 1, again in the second half if ROWS is 8."""
    row = tl.arange(0, 16) % ROWS
    j = tl.arange(0, PADDED)
    mask = (row < GROUP)[:, None] & (j < WIDTH)[None, :]
    at = row[:, None] * stride + column + j[None, :]
    return tl.load(query + at, mask, other=0.0).to(tl.float32)


@triton.jit
def _quantized(q, ROWS: tl.constexpr):
    """(hi and lo (16, width) int8, scale (ROWS,)); with 8 rows both share one tile, twice."""
    scale = tl.max(tl.abs(q), 1) / 127
    scale = tl.where(scale > 0, scale, 1.0)
    q = q / scale[:, None]
    hi = tl.floor(q + 0.5)
    lo = tl.floor((q - hi) * HI + 0.5)
    if ROWS == 8:
        hi = tl.where((tl.arange(0, 16) < 8)[:, None], hi, lo)
    return hi.to(tl.int8), lo.to(tl.int8), scale


@triton.jit
def _first_half(x, ROWS: tl.constexpr):
    """(16,) with equal halves: the first ROWS."""
    if ROWS == 16:
        return x
    else:
        return tl.max(tl.reshape(x, (2, 8)), 0)


@triton.jit
def _prepare(query, stride, K: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
             ROWS: tl.constexpr):  # fmt: skip
    """Per dot product of K: (hi, lo, scale, offset); raw pieces use hi alone."""
    out = ()
    for k in tl.static_range(len(K)):
        for half in tl.static_range(2 if K[k][0] == 4 else 1):
            q = _query_rows(query, stride, K[k][5 + half], K[k][3], K[k][4], GROUP, ROWS)
            if K[k][0] == 16:
                if ROWS == 8:
                    q = tl.where((tl.arange(0, 16) < 8)[:, None], q, 0.0)
                out = out + ((q.to(DTYPE), q.to(DTYPE), tl.zeros((ROWS,), tl.float32) + 1),)
            else:
                hi, lo, scale = _quantized(q, ROWS)
                out = out + ((hi, lo, _first_half(scale, ROWS)),)
    return out


@triton.jit
def _int_product(q, codes, ROWS: tl.constexpr):
    """(ROWS, tokens) float32 of an int8 query in two terms with int8 codes (tokens, width)."""
    s = tl.dot(q[0], tl.trans(codes), out_dtype=tl.int32)
    if ROWS == 8:
        s = fold(s * tl.where(tl.arange(0, 16) < 8, HI, 1)[:, None], ROWS)
    else:
        s = s * HI + tl.dot(q[1], tl.trans(codes), out_dtype=tl.int32)
    return s.to(tl.float32) * (q[2] * (1.0 / HI))[:, None]


@triton.jit
def _codes(base, valid, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """(tokens, PADDED) codes; zero beyond the width and for tokens that are not valid."""
    j = tl.arange(0, PADDED)
    if WIDTH == PADDED:  # noqa: SIM108
        mask = valid[:, None]
    else:
        mask = valid[:, None] & (j < WIDTH)[None, :]
    return tl.load(base[:, None] + j[None, :], mask, other=0)


@triton.jit
def _scales(base, index, valid):
    pointer = base.to(tl.pointer_type(tl.bfloat16)) + index
    return tl.load(pointer, valid, other=0.0).to(tl.float32)


@triton.jit
def _scores(q, base, offset, valid, AT: tl.constexpr, K: tl.constexpr, DTYPE: tl.constexpr,
            ROWS: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """(ROWS, tokens) products of the queries with K."""
    k_base = base + (AT[1] + offset * AT[2])
    total = tl.zeros((ROWS, valid.shape[0]), tl.float32)
    for k in tl.static_range(len(K)):
        piece = k_base + K[k][1]
        if K[k][0] == 16:
            codes = _codes(piece.to(tl.pointer_type(DTYPE)), valid, K[k][3], K[k][4])
            if INTERPRET:
                s = tl.dot(q[K[k][7]][0].to(tl.float32), tl.trans(codes.to(tl.float32)),
                           input_precision="ieee")  # fmt: skip
            else:
                s = tl.dot(q[K[k][7]][0], tl.trans(codes))
            total += fold(s, ROWS)
        else:
            codes = _codes(piece, valid, K[k][3], K[k][4])
            if K[k][0] == 8:
                s = _int_product(q[K[k][7]], codes.to(tl.int8, bitcast=True), ROWS)
            else:
                low = (codes & 15).to(tl.int8, bitcast=True) - 8
                high = (codes >> 4).to(tl.int8, bitcast=True) - 8
                s = _int_product(q[K[k][7]], low, ROWS) + _int_product(q[K[k][7] + 1], high, ROWS)
            scale = _scales(base + (AT[5] + offset * AT[6]), K[k][2], valid)
            total += s * scale[None, :]
    return total


@triton.jit
def _add_values(sums, p, base, offset, valid, AT: tl.constexpr, V: tl.constexpr,
                DTYPE: tl.constexpr, ROWS: tl.constexpr, INTERPRET: tl.constexpr):  # fmt: skip
    """sums + weights (ROWS, tokens) times V, piece by piece; p's scale comes per band."""
    v_base = base + (AT[3] + offset * AT[4])
    out = ()
    for v in tl.static_range(len(V)):
        piece = v_base + V[v][1]
        if V[v][0] == 16:
            values = _codes(piece.to(tl.pointer_type(DTYPE)), valid, V[v][3], V[v][3])
            weights = p
        else:
            weights = p * _scales(base + (AT[7] + offset * AT[8]), V[v][2], valid)[None, :]
            if V[v][0] != -4:
                codes = _codes(piece, valid, V[v][3], V[v][3])
        weights = unfold(weights, ROWS)
        if V[v][0] == 4:
            values, high = nibbles(codes, INTERPRET)
        elif V[v][0] == -4:
            values = high
        elif V[v][0] == 8:
            values = int8_values(codes, INTERPRET)
        if INTERPRET:
            values = values.to(tl.float32)
            out = out + (tl.dot(weights, values, sums[v], input_precision="ieee"),)
        else:
            out = out + (tl.dot(weights.to(values.dtype), values, sums[v]),)
    return out


@triton.jit
def _no_sums(WIDTH: tl.constexpr):
    return tl.zeros((16, WIDTH), tl.float32)


@triton.jit
def _attend(
    query, q_stride, cache, block_stride, table, first, last, score_scale, soft_cap,
    sums_ptr, maxima_ptr, weights_ptr,
    AT: tl.constexpr, K: tl.constexpr, V: tl.constexpr, TILE: tl.constexpr,
    DTYPE: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    HAS_CAP: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """Attention over tokens [first, last) of one sequence and head, into the workspace."""
    q = _prepare(query, q_stride, K, DTYPE, GROUP, ROWS)
    sums = ()
    for v in tl.static_range(len(V)):
        sums = sums + (_no_sums(V[v][3]),)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    weight = tl.zeros((ROWS,), tl.float32)
    for t in range(first, last, TILE):
        token = t + tl.arange(0, TILE)
        valid = token < last
        if AT[0] % TILE == 0:  # the tile lies in one block: all but the row is scalar
            block = tl.load(table + t // AT[0]).to(tl.int64)
            offset = t % AT[0] + tl.arange(0, TILE)
        else:
            block = tl.load(table + token // AT[0], valid, other=0).to(tl.int64)
            offset = token % AT[0]
        base = tl.multiple_of(cache + block * block_stride, 16)
        s = _scores(q, base, offset, valid, AT, K, DTYPE, ROWS, INTERPRET)
        s = capped(s * score_scale, soft_cap, HAS_CAP)
        s = tl.where(valid[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - new_top[:, None])
        fade = tl.exp2(top - new_top)
        weight = weight * fade + tl.sum(p, 1)
        factor = unfold(fade[:, None], ROWS)
        faded = ()
        for v in tl.static_range(len(V)):
            faded = faded + (sums[v] * factor,)
        sums = _add_values(faded, p, base, offset, valid, AT, V, DTYPE, ROWS, INTERPRET)
        top = new_top
    row = tl.arange(0, 16)
    for v in tl.static_range(len(V)):
        column = V[v][4] + tl.arange(0, V[v][3])
        at = sums_ptr + row[:, None] * DIM + column[None, :]
        tl.store(at, sums[v], (row < GROUP)[:, None])
    rows = tl.arange(0, ROWS)
    tl.store(maxima_ptr + rows, top)
    tl.store(weights_ptr + rows, weight)


@triton.jit
def split_kernel(
    query, rotated, recent, pages, recent_table, archive_table, starts, lengths,
    sums_ptr, maxima_ptr, weights_ptr, batch, target, least, score_scale, soft_cap,
    q_stride_b, q_stride_h, a_stride_b, a_stride_g, a_stride_h,
    r_stride_b, r_stride_h, p_stride_b, p_stride_h, rt_stride, at_stride,
    A_AT: tl.constexpr, A_K: tl.constexpr, A_V: tl.constexpr, A_COST: tl.constexpr,
    A_TILE: tl.constexpr, R_AT: tl.constexpr, R_K: tl.constexpr, R_V: tl.constexpr,
    R_COST: tl.constexpr, R_TILE: tl.constexpr, DTYPE: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, DIM: tl.constexpr, BATCH: tl.constexpr, HAS_CAP: tl.constexpr,
    INTERPRET: tl.constexpr,
):  # fmt: skip
    """Grid (kv_heads, target + 2 * batch). Programs past the list's end return at once.

    Args:
        query: (batch, heads, DIM); rotated: the same for archived K, other strides.
        recent, pages: bytes; strides in bytes. Tables: int32, their rows' strides.
        least: least cost of a chunk. score_scale: softmax scale, times log2(e) without cap.
        A_*, R_*: `Part` of the archive and of the recent pages, and tokens at a time.
    """
    head = tl.program_id(0)
    chunk = tl.program_id(1)
    archived, a_size, a_count, raw, r_size, r_count = chunk_lists(
        starts, lengths, batch, target, least, A_COST, R_COST, A_TILE, R_TILE, BATCH
    )
    a_total = tl.sum(a_count)
    slot = (chunk * tl.num_programs(0) + head).to(tl.int64)
    sums_ptr += slot * ROWS * DIM
    maxima_ptr += slot * ROWS
    weights_ptr += slot * ROWS
    if chunk < a_total:
        sequence, first, last = _find(chunk, archived, a_size, a_count, BATCH)
        row = sequence.to(tl.int64)
        _attend(
            rotated + row * a_stride_b + head.to(tl.int64) * a_stride_g, a_stride_h,
            pages + head.to(tl.int64) * p_stride_h, p_stride_b, archive_table + row * at_stride,
            first, last, score_scale, soft_cap, sums_ptr, maxima_ptr, weights_ptr,
            A_AT, A_K, A_V, A_TILE, DTYPE, GROUP, ROWS, DIM, HAS_CAP, INTERPRET,
        )  # fmt: skip
    elif chunk < a_total + tl.sum(r_count):
        sequence, first, last = _find(chunk - a_total, raw, r_size, r_count, BATCH)
        row = sequence.to(tl.int64)
        begin = tl.load(starts + row)
        _attend(
            query + row * q_stride_b + head.to(tl.int64) * GROUP * q_stride_h, q_stride_h,
            recent + head.to(tl.int64) * r_stride_h, r_stride_b, recent_table + row * rt_stride,
            begin + first, begin + last, score_scale, soft_cap, sums_ptr, maxima_ptr, weights_ptr,
            R_AT, R_K, R_V, R_TILE, DTYPE, GROUP, ROWS, DIM, HAS_CAP, INTERPRET,
        )  # fmt: skip
