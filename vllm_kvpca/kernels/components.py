"""Attention over quantized components without expanding them per token.

Scales are applied to scores and weights, one number per token and band, not to components:

    scores_i = sum_b s_ib (q_b . codes_ib)         out_b = sum_i (p_i s_ib) codes_ib

and a nibble's offset of 8 is taken out after the sum. Worth it for few query rows, as in
decoding; many rows amortize an expansion and use a fused kernel instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vllm_kvpca.codec.bands import NIBBLE_OFFSET, RAW_BITS, Band


def scores(
    query: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bands: Sequence[Band],
    raw_dtype: torch.dtype,
) -> torch.Tensor:
    """Products of queries with stored K.

    Args:
        query: (batch, heads, rows, stored_width) float32 in component space.
        codes: (batch, heads, blocks, block_size, code_bytes) uint8, any strides.
        scales: (batch, heads, blocks, block_size, num_scales).

    Returns:
        (batch, heads, rows, length) float32, length = blocks * block_size.
    """
    total: torch.Tensor | None = None
    for part, offset, scale, columns in _runs(codes, scales, bands, raw_dtype):
        q = query[..., columns]
        run = q @ part.transpose(-1, -2)
        if offset:
            run -= offset * q.sum(-1, keepdim=True)
        if scale is not None:
            run *= scale.unsqueeze(-2)
        total = run if total is None else total.add_(run)
    assert total is not None, "a format stores at least one band"
    return total


def weighted_sum(
    weights: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    bands: Sequence[Band],
    raw_dtype: torch.dtype,
) -> torch.Tensor:
    """Sum of stored V over tokens.

    Args:
        weights: (batch, heads, rows, length) float32.
        codes, scales: as in `scores`.

    Returns:
        (batch, heads, rows, stored_width) float32 in component space.
    """
    runs = []
    for part, offset, scale, _ in _runs(codes, scales, bands, raw_dtype):
        w = weights if scale is None else weights * scale.unsqueeze(-2)
        run = w @ part
        if offset:
            run -= offset * w.sum(-1, keepdim=True)
        runs.append(run)
    return torch.cat(runs, -1)


def _runs(
    codes: torch.Tensor, scales: torch.Tensor, bands: Sequence[Band], raw_dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, int, torch.Tensor | None, slice]]:
    """Runs of components: (values float32, offset to subtract, scale, columns)."""
    byte = column = index = 0
    for band in bands:
        part = codes[..., byte : byte + band.code_bytes]
        byte += band.code_bytes
        if not band.bits:
            continue
        columns = slice(column, column + band.width)
        column += band.width
        if band.bits == RAW_BITS:
            yield expand(part.view(raw_dtype)), 0, None, columns
            continue
        scale = expand(scales[..., index])
        index += 1
        if band.bits == 8:
            yield expand(part.view(torch.int8)), 0, scale, columns
        else:
            middle = columns.start + band.width // 2
            low, high = slice(columns.start, middle), slice(middle, columns.stop)
            yield expand(part & 15), NIBBLE_OFFSET, scale, low
            yield expand(part >> 4), NIBBLE_OFFSET, scale, high


def expand(blocks: torch.Tensor) -> torch.Tensor:
    """(batch, heads, blocks, block_size, ...) to float32 (batch, heads, length, ...).

    Converts and makes contiguous in one pass; flattening then copies nothing.
    """
    return blocks.to(torch.float32, memory_format=torch.contiguous_format).flatten(2, 3)
