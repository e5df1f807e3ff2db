"""Attention over each tier of some sequences, in plain torch.

Grouped query heads are folded into rows: (batch, kv_heads, tokens * group, head_dim), so a
KV head is read once for all its query heads.
"""

from __future__ import annotations

import torch

from vllm_kvpca.ops.attend import components
from vllm_kvpca.ops.attend.softmax import (
    Partial,
    Softmax,
    causal_attention,
    length_mask,
    merge,
    partial_attention,
    softmax_weights,
)
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.layout import TOGETHER, ArchiveLayout

FEW_ROWS = 32
"""Query rows up to which components are not expanded (see ops.attend.components)."""
TILE_TOKENS = 16384
"""Archived tokens (batch times length) expanded to float32 at a time: bounds the workspace."""


def attend_archive(
    query: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    codec: LayerCodec,
    softmax: Softmax,
) -> Partial:
    """Attention over archived tokens, in component space.

    Args:
        query: (batch, kv_heads, rows, head_dim) float32, rows = tokens * group.
        pages: (blocks, kv_heads, head_bytes) uint8.
        table: (batch, width) block ids; entries past a length are not used.
        lengths: (batch,) archived tokens per sequence.

    Returns:
        Partial in head space: out (batch, kv_heads, rows, head_dim).
    """
    layout = codec.layout
    rotated = codec.rotate_query(query)
    step = max(1, TILE_TOKENS // (layout.block_size * len(table)))
    result: Partial | None = None
    for first in range(0, table.shape[1], step):
        tile = _load_archive_tile(pages, table[:, first : first + step], lengths, first, layout)
        begin, size = first * layout.block_size, tile.shape[2] * layout.block_size
        mask = length_mask(lengths, begin, size)
        bias = codec.bias_scores(query, begin, size)
        part = _attend_tile(rotated, tile, mask, bias, codec, softmax)
        result = part if result is None else merge(result, part)
    assert result is not None, "a batch without archived tokens must not get here"
    return Partial(codec.restore_output(result.out), result.lse)


def _attend_tile(
    rotated: torch.Tensor,
    tile: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    codec: LayerCodec,
    softmax: Softmax,
) -> Partial:
    """Attention over one tile (batch, kv_heads, blocks, head_bytes), in component space.

    Args:
        bias: (batch, kv_heads, rows, tokens), to be added to the products; see bias_scores.
    """
    layout = codec.layout
    k_codes, v_codes = (layout.codes(tile, which) for which in "kv")
    k_scales, v_scales = (
        layout.scales(tile, region) for region in (layout.k_scales, layout.v_scales)
    )
    if rotated.shape[2] > FEW_ROWS and (bias is None or not softmax.soft_cap):
        key = codec.decode(_by_token(k_codes), k_scales, "k").flatten(2, 3)
        value = codec.decode(_by_token(v_codes), v_scales, "v").flatten(2, 3)
        if bias is not None:  # without a cap a score's summand may come with the mask
            mask = mask + bias * softmax.scale
        return partial_attention(rotated, key, value, mask, *softmax)
    products = components.scores(
        rotated * softmax.scale, k_codes, k_scales, layout.k_bands, codec.dtype
    )
    if bias is not None:
        products += bias * softmax.scale
    weights = softmax_weights(products, mask, softmax.soft_cap)
    out = components.weighted_sum(weights.out, v_codes, v_scales, layout.v_bands, codec.dtype)
    return Partial(out, weights.lse)


def _by_token(codes: list[torch.Tensor]) -> torch.Tensor:
    """(..., block_size, code_bytes) uint8 of the views of ArchiveLayout.codes."""
    parts = [view.flatten(-3, -2).contiguous().view(torch.uint8) for view in codes]
    return torch.cat(parts, -1)


def _load_archive_tile(
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    first: int,
    layout: ArchiveLayout,
) -> torch.Tensor:
    """(batch, kv_heads, blocks, head_bytes) of some pages, zero beyond each length."""
    tile = _gather(pages, table)
    sequence, block, token = _outside(lengths, first, table.shape[1], layout.block_size)
    for codes in (*layout.codes(tile, "k"), *layout.codes(tile, "v")):
        codes[sequence, block, :, token // TOGETHER, token % TOGETHER] = 0
    for region in (layout.k_scales, layout.v_scales):
        layout.scales(tile, region)[sequence, block, :, token] = 0
    return tile.transpose(1, 2)


def _gather(cache: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """cache[table]: whole blocks are contiguous, and index_select copies them as such."""
    return cache.index_select(0, table.flatten()).unflatten(0, table.shape)


def _outside(
    ends: torch.Tensor,
    first: int,
    blocks: int,
    block_size: int,
    skips: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sequence, block, token) of every loaded position outside its sequence's [skip, end).

    Such positions hold whatever the page's last owner left, NaN included; a mask on the
    scores alone would let it through.
    """
    position = torch.arange(blocks * block_size, device=ends.device) + first * block_size
    outside = position[None, :] >= ends[:, None]
    if skips is not None:
        outside |= position[None, :] < skips[:, None]
    sequence, index = outside.nonzero(as_tuple=True)
    return sequence, index // block_size, index % block_size


def attend_recent(
    query: torch.Tensor,
    recent: torch.Tensor,
    table: torch.Tensor,
    skips: torch.Tensor,
    lengths: torch.Tensor,
    softmax: Softmax,
) -> Partial:
    """Attention over raw tokens in recent pages.

    Args:
        query: (batch, kv_heads, rows, head_dim) float32.
        recent: (blocks, kv_heads, raw_block, 2 * head_dim).
        table: (batch, width) block ids, starting with each sequence's first raw block.
        skips: (batch,) tokens of the first block that are archived.
        lengths: (batch,) raw tokens per sequence, after those.
    """
    tile = _gather(recent, table)
    ends = skips + lengths
    sequence, block, token = _outside(ends, 0, table.shape[1], recent.shape[2], skips)
    tile[sequence, block, :, token] = 0
    key, value = components.expand(tile.transpose(1, 2)).chunk(2, -1)
    mask = length_mask(ends, 0, key.shape[2], skips)
    return partial_attention(query, key, value, mask, *softmax)


def attend_new(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: int,
    softmax: Softmax,
) -> Partial:
    """Causal attention of a step's new tokens over themselves.

    Args:
        query: (batch, kv_heads, tokens * group, head_dim) float32, row = token * group + g.
        key, value: (batch, kv_heads, tokens, head_dim) float32. Padding follows the real
            tokens, so causality hides it from them.
    """
    batch, heads, tokens, dim = key.shape
    # One query head per row of heads: then plain causality applies, half the products of a
    # full mask, and the fused CPU kernel can be used.
    query = query.view(batch, heads, tokens, group, dim).transpose(2, 3).flatten(1, 2)
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    part = causal_attention(query, key, value, *softmax)
    out = part.out.view(batch, heads, group, tokens, dim).transpose(2, 3).flatten(2, 3)
    lse = part.lse.view(batch, heads, group, tokens).transpose(2, 3).flatten(2, 3)
    return Partial(out, lse)
