"""Gather: expand archived or recent tokens into a workspace for prefill attention."""
# Triton reads annotations of kernel parameters, so only tl.constexpr is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvpca.kernels.band_table import check_last_dim, layout_constants
from vllm_kvpca.kernels.layer_codec import LayerCodec

TILE_TOKENS = 32


def gather(
    pages: torch.Tensor,
    archive_table: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    offsets: torch.Tensor,
    max_tokens: int,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
    codec: LayerCodec,
) -> None:
    """Expand archived tokens, K and V each in its component space.

    Component j lands in column j, zero where its band has 0 bits: the caller rotates the
    query with the whole k_basis and multiplies the output by the whole v_basis^T. The
    reference is `reference.gather`.

    Args:
        pages: (blocks, kv_heads, head_bytes) uint8.
        archive_table: (batch, width) int32 block ids by position in the sequence.
        begins, ends: (batch,) int32; sequence i's tokens are [begins[i], ends[i]).
        offsets: (batch,) or more int32; they go to rows offsets[i] and following. A list of
            cumulated counts does.
        max_tokens: about the most tokens of one sequence. It sizes the grid only: longer
            sequences are served too.
        out_k, out_v: (rows, kv_heads, head_dim) in the model's dtype; other rows are left
            as they are.
    """
    check_last_dim(pages=pages, archive_table=archive_table, out_k=out_k, out_v=out_v)
    if not max_tokens:
        return
    tiles = triton.cdiv(max_tokens, TILE_TOKENS)
    grid = (tiles, 2 * out_k.shape[1], len(begins))
    _gather_kernel[grid](
        pages,
        archive_table,
        begins,
        ends,
        offsets,
        out_k,
        out_v,
        *pages.stride()[:2],
        archive_table.stride(0),
        *out_k.stride()[:2],
        *out_v.stride()[:2],
        TILE=TILE_TOKENS,
        **layout_constants(codec.layout),
    )


def gather_recent(
    recent: torch.Tensor,
    recent_table: torch.Tensor,
    begins: torch.Tensor,
    ends: torch.Tensor,
    offsets: torch.Tensor,
    max_tokens: int,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> None:
    """Copy raw tokens; the reference is `reference.gather_recent`.

    Args:
        recent: (blocks, kv_heads, raw_block, 2 * head_dim).
        recent_table: (batch, width) int32 block ids by position in the sequence.
        Others: as in `gather`.
    """
    check_last_dim(recent=recent, recent_table=recent_table, out_k=out_k, out_v=out_v)
    if not max_tokens:
        return
    head_dim = out_k.shape[2]
    tiles = triton.cdiv(max_tokens, TILE_TOKENS)
    grid = (tiles, out_k.shape[1], len(begins))
    _gather_recent_kernel[grid](
        recent,
        recent_table,
        begins,
        ends,
        offsets,
        out_k,
        out_v,
        *recent.stride()[:3],
        recent_table.stride(0),
        *out_k.stride()[:2],
        *out_v.stride()[:2],
        RAW_BLOCK=recent.shape[2],
        HEAD_DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        TILE=TILE_TOKENS,
    )


@triton.jit
def _gather_kernel(
    pages,
    table,
    begins,
    ends,
    offsets,
    out_k,
    out_v,
    page_block_stride,
    page_head_stride,
    table_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    TILE: tl.constexpr,
    K_CODES: tl.constexpr,
    K_SCALES: tl.constexpr,
    K_BANDS: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALES: tl.constexpr,
    V_BANDS: tl.constexpr,
    ARCHIVE_BLOCK: tl.constexpr,
):
    """Expand tiles of one sequence, for one head of K or V: program_id(1) = 2 * head (+ 1).

    Byte map of one head of a page (N tokens; offsets and widths are pages.layout's):

        | K codes [N, width] | V codes [N, width] | K scales [N, scales] | V scales | padding |

    and of one token's codes, band after band: 16 bits as they are, 8 bits one byte each, 4
    bits: byte j holds component j (low nibble) and j + width/2 (high nibble), as code + 8.
    """
    sequence = tl.program_id(2).to(tl.int64)
    head = (tl.program_id(1) // 2).to(tl.int64)
    begin = tl.load(begins + sequence)
    end = tl.load(ends + sequence)
    offset = tl.load(offsets + sequence).to(tl.int64)
    row = table + sequence * table_stride
    heads = pages + head * page_head_stride
    for first in range(begin + tl.program_id(0) * TILE, end, tl.num_programs(0) * TILE):
        position = first + tl.arange(0, TILE)
        valid = position < end
        block = tl.load(row + position // ARCHIVE_BLOCK, mask=valid, other=0).to(tl.int64)
        token = position % ARCHIVE_BLOCK
        page = heads + block * page_block_stride
        target = offset + (position - begin)
        if tl.program_id(1) % 2 == 0:
            out = out_k + target * k_token_stride + head * k_head_stride
            _expand(page, token, valid, out, K_CODES, K_SCALES, K_BANDS)
        else:
            out = out_v + target * v_token_stride + head * v_head_stride
            _expand(page, token, valid, out, V_CODES, V_SCALES, V_BANDS)


@triton.jit
def _gather_recent_kernel(
    recent,
    table,
    begins,
    ends,
    offsets,
    out_k,
    out_v,
    recent_block_stride,
    recent_head_stride,
    recent_token_stride,
    table_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    RAW_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
):
    """Copy tiles of one sequence, for one head. A recent token is K, then V, contiguous."""
    sequence = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    begin = tl.load(begins + sequence)
    end = tl.load(ends + sequence)
    offset = tl.load(offsets + sequence).to(tl.int64)
    row = table + sequence * table_stride
    heads = recent + head * recent_head_stride
    column = tl.arange(0, WIDTH)[None, :]
    for first in range(begin + tl.program_id(0) * TILE, end, tl.num_programs(0) * TILE):
        position = first + tl.arange(0, TILE)
        valid = position < end
        block = tl.load(row + position // RAW_BLOCK, mask=valid, other=0).to(tl.int64)
        token = (position % RAW_BLOCK).to(tl.int64)
        source = heads + block * recent_block_stride + token * recent_token_stride
        target = offset + (position - begin)
        mask = valid[:, None] & (column < HEAD_DIM)
        k = tl.load(source[:, None] + column, mask=mask)
        v = tl.load(source[:, None] + HEAD_DIM + column, mask=mask)
        k_row = out_k + target * k_token_stride + head * k_head_stride
        v_row = out_v + target * v_token_stride + head * v_head_stride
        tl.store(k_row[:, None] + column, k.to(out_k.dtype.element_ty), mask=mask)
        tl.store(v_row[:, None] + column, v.to(out_v.dtype.element_ty), mask=mask)


@triton.jit
def _expand(
    page,
    token,
    valid,
    out,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    BANDS: tl.constexpr,
):
    """Dequantize a tile, band by band, and write it to the rows `out`."""
    codes = page + CODES[0] + token * CODES[1]
    scales = (page + SCALES[0] + token * SCALES[1]).to(tl.pointer_type(tl.bfloat16))
    for i in tl.static_range(len(BANDS)):
        _expand_band(codes, scales, valid, out, BANDS, i)


@triton.jit
def _expand_band(codes, scales, valid, out, BANDS: tl.constexpr, INDEX: tl.constexpr):
    """Expand band INDEX (a row of `band_table`): float32 products, rounded once to out's dtype."""
    bits: tl.constexpr = BANDS[INDEX][0]
    width: tl.constexpr = BANDS[INDEX][1]
    # What one load of codes fills: a nibble band is two runs of half its width.
    run: tl.constexpr = width // 2 if bits == 4 else width
    kind: tl.constexpr = out.dtype.element_ty
    columns = tl.arange(0, triton.next_power_of_2(run))[None, :]
    mask = valid[:, None] & (columns < run)
    source = codes[:, None] + BANDS[INDEX][3]
    target = out[:, None] + BANDS[INDEX][2] + columns
    if bits == 16:
        raw = tl.load(source.to(tl.pointer_type(kind)) + columns, mask=mask)
        tl.store(target, raw, mask=mask)
    elif bits == 0:
        tl.store(target, tl.zeros(target.shape, kind), mask=mask)
    else:
        scale = tl.load(scales + BANDS[INDEX][4], mask=valid, other=0.0).to(tl.float32)[:, None]
        code = tl.load(source + columns, mask=mask, other=0)
        if bits == 8:
            x = code.to(tl.int8, bitcast=True).to(tl.float32) * scale
            tl.store(target, x.to(kind), mask=mask)
        else:
            low = ((code & 15).to(tl.float32) - 8.0) * scale
            high = ((code >> 4).to(tl.float32) - 8.0) * scale
            tl.store(target, low.to(kind), mask=mask)
            tl.store(target + run, high.to(kind), mask=mask)
