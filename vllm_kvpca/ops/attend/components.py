"""Attention over quantized components without expanding them per token.

Scales are applied to scores and weights, one number per token and band, not to components:

    scores_i = sum_b s_ib (q_b . codes_ib)         out_b = sum_i (p_i s_ib) codes_ib

Worth it for few query rows, as in decoding; many rows amortize an expansion and use a fused
kernel instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from vllm_kvpca.codec.bands import RAW_BITS, Band, signed_nibbles


def scores(
    query: torch.Tensor,
    codes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bands: Sequence[Band],
    raw_dtype: torch.dtype,
) -> torch.Tensor:
    """Products of queries with stored K.

    Args:
        query: (batch, heads, rows, stored_width) float32 in component space.
        codes: of each stored band, see ArchiveLayout.codes; leading dimensions (batch, heads,
            blocks), any strides.
        scales: (batch, heads, blocks, block_size, num_scales).

    Returns:
        (batch, heads, rows, length) float32, length = blocks * block_size.
    """
    total: torch.Tensor | None = None
    for part, scale, columns in _runs(codes, scales, bands, raw_dtype):
        run = query[..., columns] @ part.transpose(-1, -2)
        if scale is not None:
            run *= scale.unsqueeze(-2)
        total = run if total is None else total.add_(run)
    assert total is not None, "a format stores at least one band"
    return total


def weighted_sum(
    weights: torch.Tensor,
    codes: Sequence[torch.Tensor],
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
    for part, scale, _ in _runs(codes, scales, bands, raw_dtype):
        w = weights if scale is None else weights * scale.unsqueeze(-2)
        runs.append(w @ part)
    return torch.cat(runs, -1)


def _runs(
    codes: Sequence[torch.Tensor],
    scales: torch.Tensor,
    bands: Sequence[Band],
    raw_dtype: torch.dtype,
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None, slice]]:
    """Runs of components: (values float32, scale, columns)."""
    column = index = 0
    for part, band in zip(codes, (band for band in bands if band.bits), strict=True):
        columns = slice(column, column + band.width)
        column += band.width
        if band.bits == RAW_BITS:
            yield expand(part.view(raw_dtype)), None, columns
            continue
        scale = scales[..., index].float().flatten(2)
        index += 1
        if band.bits == 8:
            yield expand(part.view(torch.int8)), scale, columns
        else:
            middle = columns.start + band.width // 2
            low, high = signed_nibbles(part)
            yield expand(low), scale, slice(columns.start, middle)
            yield expand(high), scale, slice(middle, columns.stop)


def expand(blocks: torch.Tensor) -> torch.Tensor:
    """(batch, heads, blocks, ..., tokens, width) to float32 (batch, heads, length, width).

    Converts and makes contiguous in one pass; flattening then copies nothing.
    """
    return blocks.to(torch.float32, memory_format=torch.contiguous_format).flatten(2, -2)
