"""Which program of a decode step attends to what: a list of chunks, made on the device.

A chunk is a run of tiles of one sequence's archive or of its recent part; tile i is the tokens
[i * TILE, (i + 1) * TILE) as far as they belong to the part. Chunks weigh about the same (by
bytes), however unequal the sequences are, and the list's capacity depends on nothing the host
does not know. All layers of a shape share the list of a step.

    chunks, one row of 8 int32 each: 2 * sequence + (0 archive, 1 recent), first tile, end
    tile, first token, end token; [archive of sequence 0, 1, ... | recent of sequence 0, 1, ...],
    then empty rows (first tile = end tile)
    spans, one row of 4 int32 for each sequence: first and number of its archive chunks, first
    and number of its recent chunks
"""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import triton
import triton.language as tl

CHUNK_FIELDS = 8
SPAN_FIELDS = 4
LISTED = 8
"""Chunks that one program lists."""


@triton.jit
def _tiles(begin, end, TILE: tl.constexpr):
    """(first tile, number of tiles) of tokens [begin, end)."""
    first = begin // TILE
    return first, tl.where(end > begin, tl.cdiv(end, TILE) - first, 0)


@triton.jit
def _share(tiles, per_tile):
    """(tiles per chunk, chunks): flooring keeps the chunks below the cost's share of them, so
    there are at most `target` of them and one more for each part."""
    count = tl.maximum((tiles.to(tl.float32) * per_tile).to(tl.int32), 1)
    size = tl.maximum(tl.cdiv(tiles, count), 1)
    return size, tl.cdiv(tiles, size)


@triton.jit
def _list(chunks, index, begin_at, part, first, tiles, size, count, begin, end, inside,
          BATCH: tl.constexpr, LISTED: tl.constexpr, FIELDS: tl.constexpr):  # fmt: skip
    """Write the rows of `chunks` that belong to one part's list, which begins at `begin_at`."""
    lane = tl.arange(0, BATCH)[None, :]
    ends = begin_at + tl.cumsum(count)
    starts = ends - count
    mine = (index[:, None] >= starts[None, :]) & (index[:, None] < ends[None, :])
    place = index - tl.sum(tl.where(mine, starts[None, :], 0), 1)
    size = tl.sum(tl.where(mine, size[None, :], 0), 1)
    listed = tl.sum(mine.to(tl.int32), 1) > 0
    end_tile = tl.sum(tl.where(mine, (first + tiles)[None, :], 0), 1)
    first = tl.sum(tl.where(mine, first[None, :], 0), 1) + place * size
    row = chunks + index * FIELDS
    mask = listed & inside
    tl.store(row, 2 * tl.sum(tl.where(mine, lane, 0), 1) + part, mask)
    tl.store(row + 1, first, mask)
    tl.store(row + 2, tl.minimum(first + size, end_tile), mask)
    tl.store(row + 3, tl.sum(tl.where(mine, begin[None, :], 0), 1), mask)
    tl.store(row + 4, tl.sum(tl.where(mine, end[None, :], 0), 1), mask)
    return listed


# Numbers that change with the step: specializing on them would compile anew.
@triton.jit(do_not_specialize=["starts", "lengths", "batch"])
def chunks_kernel(
    starts, lengths, chunks, spans, batch, capacity, target, least,
    A_COST: tl.constexpr, A_TILE: tl.constexpr, R_COST: tl.constexpr, R_TILE: tl.constexpr,
    BATCH: tl.constexpr, LISTED: tl.constexpr, CHUNK_FIELDS: tl.constexpr,
    SPAN_FIELDS: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(capacity / LISTED),).

    Args:
        starts, lengths: (batch,) int32, see ops.attend.decode.decode.
        capacity: rows of `chunks`. target: chunks to aim at. least: least cost of one.
        A_*, R_*: cost of a token, and tokens per tile, of archive and recent.
    """
    i = tl.arange(0, BATCH)
    start = tl.load(starts + i, i < batch, other=0)
    length = tl.load(lengths + i, i < batch, other=0)
    start = tl.where(length > 0, start, 0)
    end = tl.maximum(length - 1, 0)
    a_first, a_tiles = _tiles(tl.zeros_like(start), start, A_TILE)
    r_first, r_tiles = _tiles(start, end, R_TILE)
    a_tile_cost: tl.constexpr = A_COST * A_TILE
    r_tile_cost: tl.constexpr = R_COST * R_TILE
    cost = tl.sum(a_tiles.to(tl.int64)) * a_tile_cost + tl.sum(r_tiles.to(tl.int64)) * r_tile_cost
    quota = tl.maximum(tl.cdiv(cost, target), least).to(tl.float32)
    a_size, a_count = _share(a_tiles, a_tile_cost / quota)
    r_size, r_count = _share(r_tiles, r_tile_cost / quota)
    a_total = tl.sum(a_count)

    index = tl.program_id(0) * LISTED + tl.arange(0, LISTED)
    inside = index < capacity
    listed = _list(chunks, index, 0, 0, a_first, a_tiles, a_size, a_count, tl.zeros_like(start),
                   start, inside, BATCH, LISTED, CHUNK_FIELDS)  # fmt: skip
    listed |= _list(chunks, index, a_total, 1, r_first, r_tiles, r_size, r_count, start, end,
                    inside, BATCH, LISTED, CHUNK_FIELDS)  # fmt: skip
    row = chunks + index * CHUNK_FIELDS
    tl.store(row + 1, 0, inside & ~listed)
    tl.store(row + 2, 0, inside & ~listed)
    if tl.program_id(0) == 0:
        span = spans + i * SPAN_FIELDS
        tl.store(span, tl.cumsum(a_count) - a_count, i < batch)
        tl.store(span + 1, a_count, i < batch)
        tl.store(span + 2, a_total + tl.cumsum(r_count) - r_count, i < batch)
        tl.store(span + 3, r_count, i < batch)
