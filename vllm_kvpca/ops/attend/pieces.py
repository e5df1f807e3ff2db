"""What the decode kernel is told before it runs: pieces of a token, tuning, workspace.

Triton wants powers of two. A band of any multiple of 8 components is therefore cut into
pieces whose widths are powers of two (40 bytes are 32 + 8), each with sums of its own, so
that nothing is loaded twice. A matrix instruction has a least length of its sums (32 for
int8, 16 for two-byte values; K's components) and of its columns (8; V's): the last piece of a
band may have to be padded to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from vllm_kvpca.codec.bands import RAW_BITS, RAW_BYTES, Band
from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.ops.attend.chunks import CHUNK_FIELDS, SPAN_FIELDS
from vllm_kvpca.pages.layout import TOGETHER, ArchiveLayout, raw_token_bytes

Pieces = tuple[tuple[int, ...], ...]
MAX_GROUP = 16
LEAST_DOT = {RAW_BITS: 16, 8: 32, 4: 32}
"""Shortest sum of a matrix instruction, in elements, for each stored width."""
LEAST_COLUMNS = 8
"""Fewest columns of a matrix instruction."""


COST_BYTES = 4
"""Unit of a token's cost."""


@dataclass(frozen=True)
class Tuning:
    """What only changes the speed.

    Attributes:
        archive_tile, recent_tile: tokens a program handles at a time.
        warps, stages: of a split program; stages is the depth of the load pipeline.
        programs: split programs that run on one multiprocessor at a time.
        waves: rounds of split programs in a full grid.
        registers: most registers of a thread, or None for the compiler's choice.
    """

    archive_tile: int = 32
    recent_tile: int = 16
    warps: int = 1
    stages: int = 3
    programs: int = 16
    waves: int = 1
    registers: int | None = 128


@dataclass(frozen=True)
class DecodeWorkspace:
    """Buffers that decode() writes before it reads; their content need not be kept.

    Attributes:
        sums: (chunks, kv_heads, rows, head_dim) float32, unnormalized sums of one chunk.
        maxima, weights: (chunks, kv_heads, rows) float32, the largest score (base-2 units)
            and the sum of 2^(score - largest).
        rotated: (kv_heads, max_batch * group, 2 * head_dim) float32, queries in K's component
            space, and what bias scores are made of; half as wide where no K has a bias taken out.
        target: chunks per KV head to aim at; a batch has at most target + 2 * batch.
        tuning: how the kernels are launched.
    """

    sums: torch.Tensor
    maxima: torch.Tensor
    weights: torch.Tensor
    rotated: torch.Tensor
    target: int
    tuning: Tuning


@dataclass(frozen=True)
class ChunkLists:
    """Which program of a decode step attends to what, see ops.attend.chunks.

    The layers of one cache group share them: groups that differ in what is archived list different
    chunks, and may run in turns.

    Attributes:
        chunks, spans: (capacity, 8) and (max_batch, 4) int32.
    """

    chunks: torch.Tensor
    spans: torch.Tensor


def make_chunks(workspace: DecodeWorkspace, max_batch: int) -> ChunkLists:
    """Lists for batches of up to `max_batch` sequences that decode with this workspace."""
    rows, device = len(workspace.sums), workspace.sums.device
    return ChunkLists(
        torch.empty(rows, CHUNK_FIELDS, dtype=torch.int32, device=device),
        torch.empty(max_batch, SPAN_FIELDS, dtype=torch.int32, device=device),
    )


def make_workspace(
    max_batch: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    max_model_len: int,
    device: torch.device,
    tuning: Tuning | None = None,
    key_bias: bool = False,
) -> DecodeWorkspace:
    """Buffers for batches of up to `max_batch` sequences of up to `max_model_len` tokens.

    key_bias: whether K of a layer is archived without its bias.

    About (multiprocessors * programs * waves + 2 * max_batch * kv_heads) * rows * head_dim
    floats and the rotated queries: 8 MB on an H100 for 64 sequences of Qwen2.5-7B, 20 MB for 256.
    """
    tuning = tuning or Tuning()
    slots = multiprocessors(device) * tuning.programs * tuning.waves
    tiles = -(-max_model_len // tuning.recent_tile) * max_batch
    target = max(1, min(slots // kv_heads, tiles))
    chunks, rows = target + 2 * max_batch, row_count(heads // kv_heads)

    def buffer(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.float32, device=device)

    return DecodeWorkspace(
        sums=buffer(chunks, kv_heads, rows, head_dim),
        maxima=buffer(chunks, kv_heads, rows),
        weights=buffer(chunks, kv_heads, rows),
        rotated=buffer(kv_heads, max_batch * (heads // kv_heads), head_dim * (1 + key_bias)),
        target=target,
        tuning=tuning,
    )


def check_tiles(block: int, tile: int) -> None:
    """A tile may reach into a second block, never a third.

    Raises:
        UnsupportedError: blocks smaller than a tile.
    """
    if block < tile:
        raise UnsupportedError(
            f"blocks of {block} tokens are too small for the decode kernel, which reads {tile} at "
            f"a time: pass --block-size {tile} or more."
        )


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def row_count(group: int) -> int:
    """Rows of a program: query heads of one KV head, padded to half or all of an MMA tile."""
    if group > MAX_GROUP:
        raise UnsupportedError(
            f"{group} query heads share a KV head, and the decode kernel takes up to {MAX_GROUP}: "
            "serve this model without --kv-compression-preset."
        )
    return 8 if group <= 8 else 16


def k_pieces(bands: Sequence[Band]) -> Pieces:
    """(bits, byte, scale, codes, padded codes, first column, second column, product).

    A 4-bit piece covers two runs of columns, those of the low and of the high nibbles, and
    makes two products; for other widths the second column is not used. `product` counts
    the products of the pieces before.
    """
    pieces: list[tuple[int, ...]] = []
    product = 0
    for band, byte, scale, column in _stored(bands):
        codes, size = _codes(band)
        done = 0
        for width, padded in _cut(codes, LEAST_DOT[band.bits]):
            first = column + done
            at = byte + done * size
            pieces.append((band.bits, at, scale, width, padded, first, first + codes, product))
            done += width
            product += 2 if band.bits == 4 else 1
    return tuple(pieces)


def v_pieces(bands: Sequence[Band]) -> Pieces:
    """(bits, byte, scale, codes, column, padded codes) of V's sums: a 4-bit piece has one for
    each nibble.

    `bits` is 4 for the low and -4 for the high nibbles of the same codes, which follow one
    another. A dropped band has one entry per piece too, with 0 bits: its sums are zero.
    """
    pieces: list[tuple[int, ...]] = []
    for band, byte, scale, column in _stored(bands):
        codes, size = _codes(band)
        done = 0
        for width, padded in _cut(codes, LEAST_COLUMNS):
            at = byte + done * size
            pieces.append((band.bits, at, scale, width, column + done, padded))
            if band.bits == 4:
                pieces.append((-4, at, scale, width, column + codes + done, padded))
            done += width
    return tuple(pieces)


def dropped_columns(bands: Sequence[Band]) -> tuple[tuple[int, int], ...]:
    """(first, last + 1) of every run of components that is not stored."""
    column, runs = 0, []
    for band in bands:
        if not band.bits:
            runs.append((column, column + band.width))
        column += band.width
    return tuple(runs)


def _stored(bands: Sequence[Band]) -> list[tuple[Band, int, int, int]]:
    """(band, first byte, scale index, first column) of every band that is stored."""
    result = []
    byte = scale = column = 0
    for band in bands:
        if band.bits:
            result.append((band, byte, scale, column))
        byte += band.code_bytes
        scale += band.scale_bytes > 0
        column += band.width
    return result


def _codes(band: Band) -> tuple[int, int]:
    """(codes, bytes of one code): a code is a raw value, an int8 or a byte of two nibbles."""
    if band.bits == RAW_BITS:
        return band.width, RAW_BYTES
    return band.code_bytes, 1


def _cut(width: int, least: int) -> list[tuple[int, int]]:
    """(width, padded width) of power-of-two pieces, largest first; a rest below `least` is
    one padded piece."""
    pieces = []
    while width:
        piece = 1 << (width.bit_length() - 1)
        if piece < least:
            pieces.append((width, least))
            break
        pieces.append((piece, piece))
        width -= piece
    return pieces


@dataclass(frozen=True)
class Part:
    """How the kernel finds a token in one of the two caches; all in bytes.

    Attributes:
        block: tokens per block.
        k_at, k_step, v_at, v_step: first code of a block's head, and from token to token.
        ks_at, ks_step, vs_at, vs_step: the same of the scales.
        together: tokens whose V codes lie together, byte by byte; v_step is then the mean.
        k, v: pieces.
        cost: of one token, in units of COST_BYTES.
    """

    block: int
    k_at: int
    k_step: int
    v_at: int
    v_step: int
    ks_at: int
    ks_step: int
    vs_at: int
    vs_step: int
    together: int
    k: Pieces
    v: Pieces
    cost: int

    @property
    def offsets(self) -> tuple[int, ...]:
        return (
            self.block,
            self.k_at,
            self.k_step,
            self.v_at,
            self.v_step,
            self.ks_at,
            self.ks_step,
            self.vs_at,
            self.vs_step,
            self.together,
        )

    @property
    def permuted(self) -> bool:
        """Whether scores come in `permuted_tokens`' order: values of 16 bits do not."""
        return self.together > 1 and all(piece[0] != RAW_BITS for piece in self.v)


def archive_part(layout: ArchiveLayout) -> Part:
    k, v, ks, vs = layout.k_codes, layout.v_codes, layout.k_scales, layout.v_scales
    return Part(
        layout.block_size,
        *(k.offset, k.width, v.offset, v.width),
        *(ks.offset, ks.width, vs.offset, vs.width),
        together=TOGETHER,
        k=k_pieces(layout.k_bands),
        v=v_pieces(layout.v_bands),
        cost=max(1, layout.content_bytes // COST_BYTES),
    )


def recent_part(head_dim: int, block_size: int) -> Part:
    """Raw pages: a token is one row, K then V."""
    step, bands = raw_token_bytes(head_dim), (Band(head_dim, RAW_BITS),)
    return Part(
        block_size,
        *(0, step, step // 2, step),
        *(0, 0, 0, 0),
        together=1,
        k=k_pieces(bands),
        v=v_pieces(bands),
        cost=step // COST_BYTES,
    )
