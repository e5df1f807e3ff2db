"""Archive: encode tokens that leave the window, and write them into archive pages.

One entry point for every step: programs find their sequences in a list on the device
(StepPlan.busy), from a grid that does not depend on it, so a launch of a decode step can be
part of a CUDA graph. In most decode steps the list is short or empty.
"""
# Triton reads annotations of kernel parameters, so only tl.constexpr is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvpca.codec.bands import MAX_SCALE_BITS
from vllm_kvpca.codec.basis import ROTATED_RANGE
from vllm_kvpca.codec.key_bias import RUN
from vllm_kvpca.ops.band_table import (
    check_last_dim,
    checked_basis,
    code_rows,
    layout_constants,
    turned_bias,
)
from vllm_kvpca.ops.dependent_launch import follow_previous, launch_options, overlaps
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.locate.kernel import boundary
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens

TILE_TOKENS = 16
"""The fewest that a matrix instruction takes: what waits in a decode step is one tile's latency."""
DECODE_TILES = 8
"""Programs for each sequence, head and tensor in a decode step; they loop if work remains."""
MAX_TILES = 128
"""The most in any step: prompts of 2,000 tokens and more fill a GPU anyway."""
MAX_SCALES = tl.constexpr((MAX_SCALE_BITS[8], MAX_SCALE_BITS[4]))
RANGE = tl.constexpr(ROTATED_RANGE)
SLOTS = 8
"""Sequences that are archived at a time; programs loop if more are listed."""


def archive(step: StepPlan, tokens: StepTokens, cache: LayerCache) -> None:
    """Archive what leaves the window in a step; see `reference.archive`.

    The step's longest sequence sizes the grid, nothing else.
    """
    pages, recent, codec = cache.pages, cache.recent, cache.codec
    key, value, policy = tokens.key, tokens.value, step.layer.policy
    check_last_dim(pages=pages, recent=recent, key=key, value=value)
    check_last_dim(recent_table=step.recent_table, archive_table=step.archive_table)
    if not len(step.lengths):
        return
    grid = (_tiles(step.max_new, policy), 2 * key.shape[1], min(SLOTS, len(step.lengths)))
    head_dim = key.shape[2]
    _archive_kernel[grid](
        pages,
        recent,
        key,
        value,
        checked_basis(codec.k_encoder),
        checked_basis(codec.v_basis),
        None if codec.k_tables is None else (codec.k_tables.slow, codec.k_tables.angles),
        (
            *pages.stride()[:2],
            *recent.stride()[:3],
            *key.stride()[:2],
            *value.stride()[:2],
        ),
        step.query_start,
        step.lengths,
        step.starts,
        step.busy,
        step.recent_table,
        step.archive_table,
        step.recent_table.stride(0),
        step.archive_table.stride(0),
        COMPRESS_AFTER=policy.compress_after,
        KEEP_RECENT=policy.keep_recent,
        ALIGN=policy.align,
        RAW_BLOCK=step.layer.raw_block,
        HEAD_DIM=head_dim,
        CHUNK=32 if head_dim % 32 == 0 else 16,
        TILE=TILE_TOKENS,
        RUN=RUN,
        OVERLAP=overlaps(),
        num_warps=4 if head_dim <= 128 else 8,
        **launch_options(overlaps()),
        **layout_constants(codec.layout),
    )


def _tiles(max_new: int, policy: Policy) -> int:
    """Programs for each sequence, head and tensor."""
    if max_new == 1:
        return DECODE_TILES
    # As a rule a step archives its new tokens' number, give or take one alignment.
    return min(MAX_TILES, triton.cdiv(max_new + policy.align, TILE_TOKENS))


# Slices of a batch's tensors start anywhere, and tables have any width: specializing on that
# would compile anew.
@triton.jit(
    do_not_specialize=[
        "query_start",
        "lengths",
        "starts",
        "busy",
        "recent_table",
        "archive_table",
        "recent_table_stride",
        "archive_table_stride",
    ]
)
def _archive_kernel(
    pages,
    recent,
    key,
    value,
    k_basis,
    v_basis,
    bias,
    strides,
    query_start,
    lengths,
    starts,
    busy,
    recent_table,
    archive_table,
    recent_table_stride,
    archive_table_stride,
    COMPRESS_AFTER: tl.constexpr,
    KEEP_RECENT: tl.constexpr,
    ALIGN: tl.constexpr,
    RAW_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
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
    OVERLAP: tl.constexpr,
):
    """Every num_programs(0)-th tile of [start, boundary), for one head of K or V, of every
    num_programs(2)-th sequence in the list. Byte map: `_archive_tile`.
    """
    follow_previous(OVERLAP)
    for listed in range(tl.program_id(2), tl.load(busy), tl.num_programs(2)):
        sequence = tl.load(busy + 1 + listed).to(tl.int64)
        length = tl.load(lengths + sequence)
        start = tl.load(starts + sequence)
        first_token = tl.load(query_start + sequence)
        computed = length - (tl.load(query_start + sequence + 1) - first_token)
        end = boundary(length, COMPRESS_AFTER, KEEP_RECENT, ALIGN)
        recent_row = recent_table + sequence * recent_table_stride
        archive_row = archive_table + sequence * archive_table_stride
        for first in range(start + tl.program_id(0) * TILE, end, tl.num_programs(0) * TILE):
            position = first + tl.arange(0, TILE)
            inside = position < end
            is_new = position >= computed
            target = tl.load(archive_row + position // ARCHIVE_BLOCK, mask=inside, other=0)
            source = tl.load(recent_row + position // RAW_BLOCK, mask=inside & ~is_new, other=0)
            # Block 0 is the null block: nothing is read from it and nothing written to it.
            valid = (target > 0) & (is_new | (source > 0))
            _archive_tile(
                pages,
                recent,
                key,
                value,
                k_basis,
                v_basis,
                bias,
                strides,
                position // RUN,
                source.to(tl.int64),
                position % RAW_BLOCK,
                (first_token + position - computed).to(tl.int64),
                is_new,
                target.to(tl.int64),
                position % ARCHIVE_BLOCK,
                valid,
                HEAD_DIM,
                CHUNK,
                TILE,
                K_CODES,
                K_SCALES,
                K_BANDS,
                V_CODES,
                V_SCALES,
                V_BANDS,
            )


@triton.jit
def _archive_tile(
    pages,
    recent,
    key,
    value,
    k_basis,
    v_basis,
    bias,
    strides,
    run,
    recent_block,
    recent_token,
    new_token,
    is_new,
    block,
    token,
    valid,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    K_CODES: tl.constexpr,
    K_SCALES: tl.constexpr,
    K_BANDS: tl.constexpr,
    V_CODES: tl.constexpr,
    V_SCALES: tl.constexpr,
    V_BANDS: tl.constexpr,
):
    """Encode TILE tokens of one head: program_id(1) is 2 * head, plus 1 for V.

    A token's source is `recent` at (recent_block, recent_token), or row new_token of key and
    value where is_new; its target is token `token` of page `block`; nothing where not valid.

    Byte map of one head of a page (N tokens; offsets and widths are pages.layout's):

        | K codes [N, codes] | V codes [N / 8, codes, 8] | K scales [N, scales] | V scales |

    and of one token's codes, band after band: 16 bits as they are, 8 bits one byte each, 4
    bits: byte j holds component j (low nibble) and j + width/2 (high nibble), signed.
    """
    # Addresses are int64: tables and slots reach this point as such.
    head = (tl.program_id(1) // 2).to(tl.int64)
    page_block, page_head, block_stride, head_stride, token_stride = strides[:5]
    key_token, key_head, value_token, value_head = strides[5:]
    page = pages + head * page_head + block * page_block
    old = recent + head * head_stride + recent_block * block_stride
    old += recent_token.to(tl.int64) * token_stride
    # Names of their own in both branches: Triton wants one type for what is set in both.
    if tl.program_id(1) % 2 == 0:
        new_k = key + head * key_head + new_token * key_token
        if bias is None:
            k_source = (old, new_k, is_new, valid)
        else:
            at_run = (bias[0] + head * HEAD_DIM, bias[1] + run.to(tl.int64) * HEAD_DIM)
            k_source = (old, new_k, is_new, valid, at_run)  # type: ignore[assignment]
        _encode(
            k_source, k_basis, head, page, token, HEAD_DIM, CHUNK, TILE, K_CODES, K_SCALES, K_BANDS
        )
    else:
        new_v = value + head * value_head + new_token * value_token
        v_source = (old + HEAD_DIM, new_v, is_new, valid)
        _encode(
            v_source, v_basis, head, page, token, HEAD_DIM, CHUNK, TILE, V_CODES, V_SCALES, V_BANDS
        )


@triton.jit
def _encode(
    source,
    basis,
    head,
    page,
    token,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    BANDS: tl.constexpr,
):
    """Encode and write the bands of K or V, one after another."""
    scales = (page + SCALES[0] + token * SCALES[1]).to(tl.pointer_type(tl.bfloat16))
    if basis is not None:
        basis += head * HEAD_DIM * HEAD_DIM
    for i in tl.static_range(len(BANDS)):
        _encode_band(source, basis, page, token, scales, HEAD_DIM, CHUNK, TILE, CODES, BANDS, i)


@triton.jit
def _encode_band(
    source,
    basis,
    page,
    token,
    scales,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    CODES: tl.constexpr,
    BANDS: tl.constexpr,
    INDEX: tl.constexpr,
):
    """Encode band INDEX (a row of `band_table`); 0 bits store nothing.

    The whole table is passed because Triton 3.6 does not take one row of it as an argument.
    """
    bits: tl.constexpr = BANDS[INDEX][0]
    width: tl.constexpr = BANDS[INDEX][1]
    column: tl.constexpr = BANDS[INDEX][2]
    valid = source[3]
    byte: tl.constexpr = BANDS[INDEX][3]
    scales += BANDS[INDEX][4]
    if bits == 16:
        raw_type: tl.constexpr = source[1].dtype.element_ty
        y, mask = _components(source, basis, column, width, HEAD_DIM, CHUNK, TILE)
        _put(code_rows(page, token, CODES, byte, raw_type), CODES, y.to(raw_type), mask, valid)
    elif bits == 8:
        y, mask = _components(source, basis, column, width, HEAD_DIM, CHUNK, TILE)
        scale, divisor = _scale(tl.div_rn(tl.max(tl.abs(y), 1), 127.0), MAX_SCALES[0])
        tl.store(scales, scale, mask=valid)
        code = _round(y, divisor, -127.0, 127.0).to(tl.uint8)
        _put(code_rows(page, token, CODES, byte, tl.uint8), CODES, code, mask, valid)
    elif bits == 4:
        half: tl.constexpr = width // 2
        low, mask = _components(source, basis, column, half, HEAD_DIM, CHUNK, TILE)
        high, _ = _components(source, basis, column + half, half, HEAD_DIM, CHUNK, TILE)
        most = tl.max(tl.maximum(low, high), 1)
        least = tl.min(tl.minimum(low, high), 1)
        extreme = tl.where(most > -least, most, least)
        scale, divisor = _scale(extreme * -0.125, MAX_SCALES[1])
        tl.store(scales, scale, mask=valid)
        code = (_round(low, divisor, -8.0, 7.0) & 15) | (_round(high, divisor, -8.0, 7.0) << 4)
        code = (code & 255).to(tl.uint8)
        _put(code_rows(page, token, CODES, byte, tl.uint8), CODES, code, mask, valid)


@triton.jit
def _components(
    source,
    basis,
    column: tl.constexpr,
    width: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Components [column, column + width) of a tile, zero past the width.

    Returns:
        y (TILE, padded) float32, and which of the padded columns exist. Columns are padded
        to a power of two and to 16, the least that tl.dot takes.
    """
    PADDED: tl.constexpr = max(16, triton.next_power_of_2(width))
    columns = tl.arange(0, PADDED)
    mask = columns < width
    if basis is None:
        y = _load(source, column + columns, mask)
    else:
        y = tl.zeros((TILE, PADDED), tl.float32)
        for first in range(0, HEAD_DIM, CHUNK):
            rows = first + tl.arange(0, CHUNK)
            x = _load(source, rows, rows < HEAD_DIM)
            if len(source) == 5:
                x -= turned_bias(source[4], rows, HEAD_DIM)
            if source[1].dtype.element_ty != tl.float16:  # which ends below
                x = tl.clamp(x, -RANGE, RANGE, propagate_nan=tl.PropagateNan.ALL)
            cells = rows[:, None] * HEAD_DIM + (column + columns)[None, :]
            b = tl.load(basis + cells, (rows < HEAD_DIM)[:, None] & mask[None, :], 0.0)
            # Three tf32 products: x (bf16 or fp16) is exact in tf32, B is split into two tf32
            # parts with 21 bits between them, so sums are as good as in float32.
            y = tl.dot(x, b, y, input_precision="tf32x3")
    return y, mask


@triton.jit
def _load(source, columns, mask):
    """Raw columns of a tile in float32, each token from where it is; others are not read."""
    old, new, is_new, valid = source[0], source[1], source[2], source[3]
    from_old = (valid & ~is_new)[:, None] & mask[None, :]
    from_new = (valid & is_new)[:, None] & mask[None, :]
    x = tl.load(old[:, None] + columns[None, :], mask=from_old, other=0.0).to(tl.float32)
    y = tl.load(new[:, None] + columns[None, :], mask=from_new, other=0.0).to(tl.float32)
    return tl.where(is_new[:, None], y, x)


@triton.jit
def _scale(exact, MAX: tl.constexpr):
    """The scale rounded to bfloat16, never -0, and what to divide by: 1 for a zero vector.

    The rounding (ties to even) is spelled out because Triton's interpreter truncates. MAX is the
    largest magnitude's bits; NaN, whose bits are larger than infinity's, is left.
    """
    bits = exact.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    rounded = tl.minimum((size + 0x7FFF + ((size >> 16) & 1)) >> 16, MAX)
    # NaN must not become a scale that looks sound.
    bits = tl.where(size > 0x7F800000, 0x7FC0, rounded) | (bits >> 31 << 15)
    bits = tl.where(bits == 0x8000, 0, bits)
    scale = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    # The interpreter's cast from bfloat16 would drop subnormal scales.
    divisor = (bits << 16).to(tl.float32, bitcast=True)
    return scale, tl.where(bits == 0, 1.0, divisor)


@triton.jit
def _round(y, divisor, low, high):
    """Codes in [low, high] as int32, rounded half to even as torch.round does.

    Adding 1.5 * 2^23 leaves float32 no bits for a fraction, so the addition itself rounds,
    and ties to even. |y / divisor| stays below 256, far inside the trick's range of 2^22.
    """
    magic = 12582912.0
    rounded = (tl.div_rn(y, divisor[:, None]) + magic) - magic
    return tl.clamp(rounded, low, high).to(tl.int32)


@triton.jit
def _put(rows, CODES: tl.constexpr, x, mask, valid):
    """Store x (TILE, padded) at `rows`, see `code_rows`."""
    columns = tl.arange(0, x.shape[1]) * CODES[2]
    tl.store(rows[:, None] + columns[None, :], x, mask=valid[:, None] & mask[None, :])
