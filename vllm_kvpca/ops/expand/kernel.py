"""Expand whole sequences, in head space, into a workspace for prefill attention.

One kernel expands what is archived, one copies what is raw: recent and new tokens.
"""
# Triton reads annotations of kernel parameters, so only tl.constexpr is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvpca.codec.key_bias import RUN
from vllm_kvpca.ops.band_table import (
    check_last_dim,
    checked_basis,
    code_rows,
    layout_constants,
    turned_bias,
)
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.narrow import narrow
from vllm_kvpca.pages.step_plan import PrefillGroup, StepPlan, StepTokens

ARCHIVE_TILE = 64
"""Archived tokens of one program: they share one pass over the basis, which stays in L2."""
RAW_TILE = 32
BASIS_CELLS = 4096
"""Cells of the basis in one product: 16 KiB, a few of which fit into shared memory."""


def expand(
    step: StepPlan,
    group: PrefillGroup,
    tokens: StepTokens,
    cache: LayerCache,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> None:
    """K and V of whole sequences, one after another; see `reference.expand`."""
    pages, recent, codec = cache.pages, cache.recent, cache.codec
    key, value, members = tokens.key, tokens.value, group.sequences
    query_start = step.query_start[members.start : members.stop + 1]
    lengths, starts = step.lengths[members], step.starts[members]
    recent_table, archive_table = step.recent_table[members], step.archive_table[members]
    check_last_dim(pages=pages, recent=recent, key=key, value=value, out_k=out_k, out_v=out_v)
    check_last_dim(recent_table=recent_table, archive_table=archive_table)
    if not (len(lengths) and group.max_length):
        return
    heads, head_dim = key.shape[1:]
    offsets, max_length = group.key_start, group.max_length
    width = triton.next_power_of_2(head_dim)
    out = (out_k, out_v, (*out_k.stride()[:2], *out_v.stride()[:2]))
    _expand_archive_kernel[(triton.cdiv(max_length, ARCHIVE_TILE), 2 * heads, len(lengths))](
        pages,
        checked_basis(codec.k_basis),
        checked_basis(codec.v_basis),
        None if codec.k_tables is None else (codec.k_tables.slow, codec.k_tables.angles),
        starts,
        archive_table,
        offsets,
        *out,
        *pages.stride()[:2],
        archive_table.stride(0),
        HEAD_DIM=head_dim,
        WIDTH=width,
        CHUNK=min(32, BASIS_CELLS // width),
        TILE=ARCHIVE_TILE,
        RUN=RUN,
        num_warps=4 if head_dim <= 128 else 8,
        num_stages=2,
        **layout_constants(codec.layout),
    )
    _expand_raw_kernel[(triton.cdiv(max_length, RAW_TILE), heads, len(lengths))](
        recent,
        key,
        value,
        query_start,
        lengths,
        starts,
        recent_table,
        offsets,
        *out,
        (*recent.stride()[:3], *key.stride()[:2], *value.stride()[:2]),
        recent_table.stride(0),
        RAW_BLOCK=step.layer.raw_block,
        HEAD_DIM=head_dim,
        WIDTH=width,
        TILE=RAW_TILE,
    )


# Slices of a batch's tensors start anywhere, and tables have any width: specializing on that
# would compile anew.
@triton.jit(do_not_specialize=["starts", "table", "offsets", "table_stride"])
def _expand_archive_kernel(
    pages,
    k_basis,
    v_basis,
    bias,
    starts,
    table,
    offsets,
    out_k,
    out_v,
    out_strides,
    page_block_stride,
    page_head_stride,
    table_stride,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    RUN: tl.constexpr,
    K_CODES: tl.constexpr,
    K_SCALES: tl.constexpr,
    K_BANDS: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALES: tl.constexpr,
    V_BANDS: tl.constexpr,
    ARCHIVE_BLOCK: tl.constexpr,
):
    """Expand one tile of one sequence, for one head of K or V: program_id(1) = 2 * head (+ 1).

    Byte map of one head of a page (N tokens; offsets and widths are pages.layout's):

        | K codes [N, codes] | V codes [N / 8, codes, 8] | K scales [N, scales] | V scales |

    and of one token's codes, band after band: 16 bits as they are, 8 bits one byte each, 4
    bits: byte j holds component j (low nibble) and j + width/2 (high nibble), signed.

    bias: BiasTables' (slow, angles), given back to K; None: none was taken out.
    """
    sequence = tl.program_id(2).to(tl.int64)
    head = (tl.program_id(1) // 2).to(tl.int64)
    end = tl.load(starts + sequence)
    first = tl.program_id(0) * TILE
    if first < end:
        position = first + tl.arange(0, TILE)
        valid = position < end
        row = table + sequence * table_stride
        block = tl.load(row + position // ARCHIVE_BLOCK, mask=valid, other=0).to(tl.int64)
        token = position % ARCHIVE_BLOCK
        page = pages + head * page_head_stride + block * page_block_stride
        target = tl.load(offsets + sequence).to(tl.int64) + position
        if tl.program_id(1) % 2 == 0:
            out = out_k + target * out_strides[0] + head * out_strides[1]
            scales = (page + K_SCALES[0] + token * K_SCALES[1]).to(tl.pointer_type(tl.bfloat16))
            source = (page, token, valid, scales)
            if k_basis is None:
                _expand(source, out, K_CODES, K_BANDS)
            else:
                basis = k_basis + head * HEAD_DIM * HEAD_DIM
                if bias is None:
                    given = None
                else:
                    angles = bias[1] + (position // RUN).to(tl.int64) * HEAD_DIM
                    given = (bias[0] + head * HEAD_DIM, angles)
                _rotate(source, out, basis, given, HEAD_DIM, WIDTH, CHUNK, TILE, K_CODES, K_BANDS)
        else:
            out = out_v + target * out_strides[2] + head * out_strides[3]
            scales = (page + V_SCALES[0] + token * V_SCALES[1]).to(tl.pointer_type(tl.bfloat16))
            source = (page, token, valid, scales)
            if v_basis is None:
                _expand(source, out, V_CODES, V_BANDS)
            else:
                basis = v_basis + head * HEAD_DIM * HEAD_DIM
                _rotate(source, out, basis, None, HEAD_DIM, WIDTH, CHUNK, TILE, V_CODES, V_BANDS)


@triton.jit
def _expand(source, out, CODES: tl.constexpr, BANDS: tl.constexpr):
    """Dequantize a tile whose components are the head vector's own.

    `source` is (page, token, valid, scales), each for the tile's tokens.
    """
    for i in tl.static_range(len(BANDS)):
        _expand_band(source, out, CODES, BANDS, i)


@triton.jit
def _expand_band(
    source, out, CODES: tl.constexpr, BANDS: tl.constexpr, INDEX: tl.constexpr
):  # fmt: skip
    """Expand band INDEX (a row of `band_table`): float32 products, rounded once to out's dtype.

    The whole table is passed because Triton 3.6 does not take one row of it as an argument.
    """
    bits: tl.constexpr = BANDS[INDEX][0]
    width: tl.constexpr = BANDS[INDEX][1]
    # What one load of codes fills: a nibble band is two runs of half its width.
    run: tl.constexpr = width // 2 if bits == 4 else width
    kind: tl.constexpr = out.dtype.element_ty
    page, token, valid, scales = source
    columns = tl.arange(0, triton.next_power_of_2(run))[None, :]
    mask = valid[:, None] & (columns < run)
    target = out[:, None] + BANDS[INDEX][2] + columns
    if bits == 16:
        raw = _codes(page, token, columns, mask, CODES, BANDS[INDEX][3], kind)
        tl.store(target, raw, mask=mask)
    elif bits == 0:
        tl.store(target, tl.zeros(target.shape, kind), mask=mask)
    else:
        scale = tl.load(scales + BANDS[INDEX][4], mask=valid, other=0.0).to(tl.float32)[:, None]
        code = _codes(page, token, columns, mask, CODES, BANDS[INDEX][3], tl.uint8)
        if bits == 8:
            x = code.to(tl.int8, bitcast=True).to(tl.float32) * scale
            tl.store(target, narrow(x, kind), mask=mask)
        else:
            low, high = _nibbles(code)
            tl.store(target, narrow(low * scale, kind), mask=mask)
            tl.store(target + run, narrow(high * scale, kind), mask=mask)


@triton.jit
def _codes(page, token, columns, mask, CODES: tl.constexpr, BYTE: tl.constexpr, kind: tl.constexpr):
    """(tokens, columns) codes of a band, zero where masked."""
    rows = code_rows(page, token, CODES, BYTE, kind)
    return tl.load(rows[:, None] + columns * CODES[2], mask=mask, other=0)


@triton.jit
def _nibbles(code):
    """Values of the low and of the high nibbles, float32."""
    low = (code << 4).to(tl.int8, bitcast=True) >> 4
    return low.to(tl.float32), (code.to(tl.int8, bitcast=True) >> 4).to(tl.float32)


@triton.jit
def _rotate(
    source,
    out,
    basis,
    bias,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CODES: tl.constexpr,
    BANDS: tl.constexpr,
):
    """Dequantize a tile and multiply it by B^T, perhaps add what `turned_bias` gives: head vectors,
    rounded once to out's dtype."""
    acc = tl.zeros((TILE, WIDTH), tl.float32)
    for i in tl.static_range(len(BANDS)):
        if BANDS[i][0] > 0:
            part = _rotate_band(
                source, basis, out.dtype.element_ty, HEAD_DIM, WIDTH, CHUNK, TILE, CODES, BANDS, i
            )
            if BANDS[i][0] < 16:
                scale = tl.load(source[3] + BANDS[i][4], mask=source[2], other=0.0)
                part *= scale.to(tl.float32)[:, None]
            acc += part
    if bias is not None:
        acc += turned_bias(bias, tl.arange(0, WIDTH), HEAD_DIM)
    column = tl.arange(0, WIDTH)[None, :]
    mask = source[2][:, None] & (column < HEAD_DIM)
    tl.store(out[:, None] + column, narrow(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def _rotate_band(
    source,
    basis,
    kind: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CODES: tl.constexpr,
    BANDS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """codes @ (band's columns of B)^T, (TILE, WIDTH) float32, without the scale.

    Products are tf32: codes of 8 bits and values of 16 are exact in it, and what it drops of
    B (below 2^-10 of an entry) is of the order of the result's rounding to bfloat16 or
    float16. Three products for all of B's bits would cost more than the memory traffic.
    """
    bits: tl.constexpr = BANDS[INDEX][0]
    width: tl.constexpr = BANDS[INDEX][1]
    # What one load of codes fills: a nibble band is two runs of half its width.
    run: tl.constexpr = width // 2 if bits == 4 else width
    stored: tl.constexpr = kind if bits == 16 else tl.uint8
    page, token, valid, _ = source
    columns = basis + BANDS[INDEX][2]
    part = tl.zeros((TILE, WIDTH), tl.float32)
    for first in range(0, run, CHUNK):
        j = first + tl.arange(0, CHUNK)
        exists = j < run
        mask = valid[:, None] & exists[None, :]
        b = _basis_chunk(columns, j, exists, HEAD_DIM, WIDTH)
        code = _codes(page, token, j[None, :], mask, CODES, BANDS[INDEX][3], stored)
        if bits == 16:
            part = tl.dot(code.to(tl.float32), b, part, input_precision="tf32")
        elif bits == 8:
            x = code.to(tl.int8, bitcast=True).to(tl.float32)
            part = tl.dot(x, b, part, input_precision="tf32")
        else:
            low, high = _nibbles(code)  # one load serves both halves of the band
            part = tl.dot(low, b, part, input_precision="tf32")
            b = _basis_chunk(columns + run, j, exists, HEAD_DIM, WIDTH)
            part = tl.dot(high, b, part, input_precision="tf32")
    return part


@triton.jit
def _basis_chunk(columns, j, exists, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """B^T[j, :]: (CHUNK, WIDTH), zero past the head and past the band."""
    row = tl.arange(0, WIDTH)
    cells = columns + row[:, None] * HEAD_DIM + j[None, :]
    mask = (row < HEAD_DIM)[:, None] & exists[None, :]
    return tl.trans(tl.load(cells, mask=mask, other=0.0))


@triton.jit(
    do_not_specialize=["query_start", "lengths", "starts", "table", "offsets", "table_stride"]
)
def _expand_raw_kernel(
    recent,
    key,
    value,
    query_start,
    lengths,
    starts,
    table,
    offsets,
    out_k,
    out_v,
    out_strides,
    strides,
    table_stride,
    RAW_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy one tile of one sequence's [start, length), for one head.

    A recent token of a head is K[HEAD_DIM], then V[HEAD_DIM], contiguous.
    """
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    end = tl.load(lengths + sequence)
    first = tl.load(starts + sequence) + tl.program_id(0) * TILE
    if first < end:
        first_token = tl.load(query_start + sequence)
        computed = end - (tl.load(query_start + sequence + 1) - first_token)
        position = first + tl.arange(0, TILE)
        is_old = position < computed
        row = table + sequence * table_stride
        block = tl.load(row + position // RAW_BLOCK, mask=is_old, other=0).to(tl.int64)
        old = recent + block * strides[0] + head * strides[1]
        old += (position % RAW_BLOCK).to(tl.int64) * strides[2]
        token = (first_token + position - computed).to(tl.int64)
        new_k = key + token * strides[3] + head * strides[4]
        new_v = value + token * strides[5] + head * strides[6]
        is_new = (position >= computed) & (position < end)
        target = tl.load(offsets + sequence).to(tl.int64) + position
        out = out_k + target * out_strides[0] + head * out_strides[1]
        _copy(old, new_k, is_old, is_new, out, HEAD_DIM, WIDTH)
        out = out_v + target * out_strides[2] + head * out_strides[3]
        _copy(old + HEAD_DIM, new_v, is_old, is_new, out, HEAD_DIM, WIDTH)


@triton.jit
def _copy(old, new, is_old, is_new, out, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of head_dim elements, each from where it is."""
    column = tl.arange(0, WIDTH)[None, :]
    exists = column < HEAD_DIM
    x = tl.load(old[:, None] + column, mask=is_old[:, None] & exists, other=0.0)
    y = tl.load(new[:, None] + column, mask=is_new[:, None] & exists, other=0.0)
    x = tl.where(is_new[:, None], y, x)
    tl.store(out[:, None] + column, x, mask=(is_old | is_new)[:, None] & exists)
