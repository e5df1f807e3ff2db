"""The kernels in plain torch: exact in what they compute, batched, on any device.

Slots address tokens in a cache: slot = block * block_size + offset; -1 means "nowhere".
Block 0 is the null block: it belongs to nobody.
Grouped query heads are folded into rows: (batch, kv_heads, tokens * group, head_dim), so a
KV head is read once for all its query heads.
"""

from __future__ import annotations

import torch

from vllm_kvpca.codec.bands import narrow
from vllm_kvpca.ops.attend import components
from vllm_kvpca.ops.attend.softmax import (
    Partial,
    causal_attention,
    length_mask,
    merge,
    partial_attention,
    softmax_weights,
)
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layout import TOGETHER, ArchiveLayout

FEW_ROWS = 32
"""Query rows up to which components are not expanded (see ops.attend.components)."""
TILE_TOKENS = 16384
"""Archived tokens (batch times length) expanded to float32 at a time: bounds the workspace."""


def store(
    recent: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write raw tokens into recent pages.

    Args:
        recent: (blocks, kv_heads, raw_block, 2 * head_dim) in the model's dtype.
        key, value: (tokens, kv_heads, head_dim).
        slots: (tokens,) int64; one in the null block 0 (or below) is nowhere, because vLLM
            maps tokens without a raw block there.
    """
    keep = slots >= recent.shape[2]
    slots = slots[keep]
    block, offset = slots // recent.shape[2], slots % recent.shape[2]
    recent[block, :, offset] = torch.cat([key[keep], value[keep]], -1).to(recent.dtype)


def load_recent(recent: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw K and V, each (tokens, kv_heads, head_dim), of slots that are all valid."""
    both = recent[slots // recent.shape[2], :, slots % recent.shape[2]]
    key, value = both.chunk(2, -1)
    return key, value


def archive(
    pages: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slots: torch.Tensor,
    codec: LayerCodec,
) -> None:
    """Encode tokens and write them into archive pages.

    Args:
        pages: (blocks, kv_heads, head_bytes) uint8.
        key, value: (tokens, kv_heads, head_dim) in the model's dtype.
        slots: (tokens,) int64; -1 leaves the cache untouched.
    """
    layout = codec.layout
    keep = slots >= 0
    slots = slots[keep]
    block, offset = slots // layout.block_size, slots % layout.block_size
    for which, x, scales_at in (("k", key, layout.k_scales), ("v", value, layout.v_scales)):
        codes, scales = codec.encode(x[keep], which)
        layout.store_codes(pages, which, block, offset, codes)
        if scales_at.width:
            layout.scales(pages, scales_at)[block, :, offset] = scales


def archive_step(
    pages: torch.Tensor,
    recent: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    recent_table: torch.Tensor,
    archive_table: torch.Tensor,
    policy: Policy,
    codec: LayerCodec,
    max_new: int = 1,
) -> None:
    """Archive [starts_i, boundary(lengths_i)) of each sequence: ops.archive.kernel.archive."""
    computed = lengths - query_start.diff()
    sequence, position = _ranges(starts, policy.boundaries(lengths))
    is_new = position >= computed[sequence]
    slots = _table_slots(archive_table, sequence, position, codec.layout.block_size)
    sources = _table_slots(recent_table, sequence, position, recent.shape[2])
    slots = torch.where(is_new | (sources >= 0), slots, -1)
    new = (query_start[sequence] + position - computed[sequence])[is_new]
    old_key, old_value = load_recent(recent, sources[~is_new].clamp_min(0))
    archive(
        pages,
        torch.cat([old_key, key[new]]),
        torch.cat([old_value, value[new]]),
        torch.cat([slots[~is_new], slots[is_new]]),
        codec,
    )


def gather(
    pages: torch.Tensor,
    recent: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    starts: torch.Tensor,
    recent_table: torch.Tensor,
    archive_table: torch.Tensor,
    offsets: torch.Tensor,
    max_length: int,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
    codec: LayerCodec,
) -> None:
    """Expand whole sequences in head space: ops.expand.kernel.gather."""
    layout = codec.layout
    computed = lengths - query_start.diff()

    sequence, position = _ranges(torch.zeros_like(starts), starts)
    slots = _table_slots(archive_table, sequence, position, layout.block_size, null=0)
    block, offset = slots // layout.block_size, slots % layout.block_size
    rows = offsets[sequence] + position
    for which, out, scales_at in (("k", out_k, layout.k_scales), ("v", out_v, layout.v_scales)):
        codes = layout.load_codes(pages, which, block, offset)
        scales = layout.scales(pages, scales_at)[block, :, offset]
        out[rows] = narrow(codec.restore(codec.decode(codes, scales, which), which), out.dtype)

    sequence, position = _ranges(starts, computed)
    rows = offsets[sequence] + position
    slots = _table_slots(recent_table, sequence, position, recent.shape[2], null=0)
    out_k[rows], out_v[rows] = load_recent(recent, slots)

    sequence, position = _ranges(computed, lengths)
    rows = offsets[sequence] + position
    new = query_start[sequence] + position - computed[sequence]
    out_k[rows], out_v[rows] = key[new], value[new]


def _ranges(begins: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, position) of every position in [begins_i, ends_i), sequence by sequence."""
    counts = (ends - begins).clamp_min(0).long()
    sequence = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    within = torch.arange(len(sequence), device=counts.device) - first[sequence]
    return sequence, begins[sequence] + within


def _table_slots(
    table: torch.Tensor,
    sequence: torch.Tensor,
    position: torch.Tensor,
    block_size: int,
    null: int = -1,
) -> torch.Tensor:
    """Slots of positions by a block table; `null` in place of slots of the null block 0."""
    ids = table[sequence, position // block_size].long()
    return torch.where(ids > 0, ids * block_size + position % block_size, null)


def attend_archive(
    query: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    lengths: torch.Tensor,
    codec: LayerCodec,
    scale: float,
    soft_cap: float | None = None,
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
        mask = length_mask(lengths, first * layout.block_size, tile.shape[2] * layout.block_size)
        part = _attend_tile(rotated, tile, mask, codec, scale, soft_cap)
        result = part if result is None else merge(result, part)
    assert result is not None, "a batch without archived tokens must not get here"
    return Partial(codec.restore_output(result.out), result.lse)


def _attend_tile(
    rotated: torch.Tensor,
    tile: torch.Tensor,
    mask: torch.Tensor,
    codec: LayerCodec,
    scale: float,
    soft_cap: float | None,
) -> Partial:
    """Attention over one tile (batch, kv_heads, blocks, head_bytes), in component space."""
    layout = codec.layout
    k_codes, v_codes = (layout.codes(tile, which) for which in "kv")
    k_scales, v_scales = (
        layout.scales(tile, region) for region in (layout.k_scales, layout.v_scales)
    )
    if rotated.shape[2] > FEW_ROWS:
        key = codec.decode(_by_token(k_codes), k_scales, "k").flatten(2, 3)
        value = codec.decode(_by_token(v_codes), v_scales, "v").flatten(2, 3)
        return partial_attention(rotated, key, value, mask, scale, soft_cap)
    products = components.scores(rotated * scale, k_codes, k_scales, layout.k_bands, codec.dtype)
    weights = softmax_weights(products, mask, soft_cap)
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
    scale: float,
    soft_cap: float | None = None,
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
    return partial_attention(query, key, value, mask, scale, soft_cap)


def attend_new(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: int,
    scale: float,
    soft_cap: float | None = None,
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
    part = causal_attention(query, key, value, scale, soft_cap)
    out = part.out.view(batch, heads, group, tokens, dim).transpose(2, 3).flatten(2, 3)
    lse = part.lse.view(batch, heads, group, tokens).transpose(2, 3).flatten(2, 3)
    return Partial(out, lse)
