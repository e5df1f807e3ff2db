"""Decode attention on a GPU: one new token per sequence over archive, recent and itself.

Once per step, plan_decode lists chunks of the two caches (decode_chunks). Then, in every
layer, split-KV programs attend to a chunk each (decode_split), and one kernel merges a
sequence's chunks, rotates V's components back to head space, once per query head, and adds
the new token (decode_merge). With a basis for K, queries are rotated before (decode_rotate).
The host reads nothing back and its launches depend on shapes alone, so all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from vllm_kvpca.ops.attend.chunks import CHUNK_FIELDS, LISTED, SPAN_FIELDS, chunks_kernel
from vllm_kvpca.ops.attend.merge import merge_kernel
from vllm_kvpca.ops.attend.pieces import (
    COST_BYTES,
    DecodeWorkspace,
    Part,
    Tuning,
    archive_part,
    check_tiles,
    dropped_columns,
    make_workspace,
    recent_part,
    row_count,
)
from vllm_kvpca.ops.attend.products import triton_dtype
from vllm_kvpca.ops.attend.rotate import rotate_kernel
from vllm_kvpca.ops.attend.split import split_kernel
from vllm_kvpca.ops.dependent_launch import interpreted, launch_options, overlaps
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.layout import ArchiveLayout, raw_token_bytes

__all__ = ["DecodeWorkspace", "Tuning", "decode", "make_workspace", "plan_decode"]

LOG2E = 1.4426950408889634
LEAST_TOKENS = 64
"""Raw tokens' worth of bytes below which a chunk does not pay for its merge."""
FEW_MERGES = 32
"""Sequences times KV heads up to which the merge takes query heads one by one."""
ROTATED_COLUMNS = 32
"""Components that a program of the rotation makes."""


def plan_decode(
    starts: torch.Tensor,
    lengths: torch.Tensor,
    layout: ArchiveLayout,
    raw_block: int,
    workspace: DecodeWorkspace,
) -> None:
    """List the chunks of a step in the workspace, for all layers that share it.

    Args:
        starts, lengths: see `decode`.
    """
    if not len(lengths):
        return
    tuning, capacity = workspace.tuning, len(workspace.chunks)
    archive, raw = archive_part(layout), recent_part(layout.head_dim, raw_block)
    chunks_kernel[(triton.cdiv(capacity, LISTED),)](
        *(starts, lengths, workspace.chunks, workspace.spans),
        *(len(lengths), capacity, workspace.target),
        LEAST_TOKENS * raw_token_bytes(layout.head_dim) // COST_BYTES,
        A_COST=archive.cost,
        A_TILE=tuning.archive_tile,
        R_COST=raw.cost,
        R_TILE=tuning.recent_tile,
        BATCH=triton.next_power_of_2(len(workspace.spans)),
        LISTED=LISTED,
        CHUNK_FIELDS=CHUNK_FIELDS,
        SPAN_FIELDS=SPAN_FIELDS,
    )


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    recent: torch.Tensor,
    pages: torch.Tensor,
    recent_table: torch.Tensor,
    archive_table: torch.Tensor,
    lengths: torch.Tensor,
    codec: LayerCodec,
    scale: float,
    soft_cap: float | None,
    out: torch.Tensor,
    workspace: DecodeWorkspace,
) -> None:
    """Attention of one new token per sequence, written into `out`, after `plan_decode` with
    starts (batch,) int32: tokens [0, start) are archived, [start, length - 1) recent.

    Args:
        query, out: (batch, heads, head_dim) in the model's dtype, last dimension contiguous.
        key, value: (batch, kv_heads, head_dim), the new tokens' own; they are attended to
            from here, whether the cache has them already or not.
        recent: (blocks, kv_heads, raw_block, 2 * head_dim); a head's part contiguous.
        pages: (blocks, kv_heads, head_bytes) uint8; a head's part contiguous.
        recent_table, archive_table: (batch, width) int32 block ids.
        lengths: (batch,) int32, tokens with the new one; 0 for a row of padding, of which
            nothing is read and whose output is 0.
        scale: factor on the scores. soft_cap: see ops.attend.softmax.partial_attention.
        workspace: from make_workspace, for at least this batch.
    """
    batch, heads, head_dim = query.shape
    kv_heads = key.shape[1]
    group, tuning = heads // kv_heads, workspace.tuning
    if not batch:
        return
    if codec.k_basis is None:
        rotated = query.unflatten(1, (kv_heads, group))
    else:
        rotated = _rotate(query, codec.k_basis, workspace)
    split, merge = _launches(
        codec.layout, head_dim, recent.shape[2], group, batch, kv_heads,
        codec.v_basis is not None, query.dtype, bool(soft_cap), tuning, overlaps(),
    )  # fmt: skip
    common = (
        *(workspace.sums, workspace.maxima, workspace.weights),
        *(scale if soft_cap else scale * LOG2E, float(soft_cap or 0.0)),
    )
    recent_bytes = recent.view(torch.uint8)
    split_kernel[(kv_heads, workspace.target + 2 * batch)](
        *(query, rotated, recent_bytes, pages, recent_table, archive_table, workspace.chunks),
        *common,
        *(query.stride(0), query.stride(1)),
        *rotated.stride()[:3],
        *(recent_bytes.stride(0), recent_bytes.stride(1), pages.stride(0), pages.stride(1)),
        *(recent_table.stride(0), archive_table.stride(0)),
        **split.constants,
        **split.options,
    )
    merge_kernel[(batch, kv_heads, -(-group // merge.constants["MERGED"]))](
        *(query, key, value, out, codec.v_basis, lengths, workspace.spans, kv_heads),
        *common,
        *(query.stride(0), query.stride(1), key.stride(0), key.stride(1)),
        *(value.stride(0), value.stride(1), out.stride(0), out.stride(1)),
        *((0, 0, 0) if codec.v_basis is None else codec.v_basis.stride()),
        **merge.constants,
        **merge.options,
    )


class Launch(NamedTuple):
    """A kernel, its compile-time arguments, and its launch options."""

    kernel: Any
    constants: dict[str, Any]
    options: dict[str, int]


@lru_cache(256)
def _launches(*args: Any) -> tuple[Launch, Launch]:
    return launches(*args)


def launches(
    layout: ArchiveLayout,
    head_dim: int,
    raw_block: int,
    group: int,
    batch: int,
    kv_heads: int = 4,
    has_basis: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    has_cap: bool = False,
    tuning: Tuning | None = None,
    overlap: bool = False,
) -> tuple[Launch, Launch]:
    """How the split and the merge kernel are compiled for one kind of batch.

    Args:
        overlap: see ops.dependent_launch.
    """
    tuning = tuning or Tuning()
    archive, raw = archive_part(layout), recent_part(head_dim, raw_block)
    check_tiles(archive.block, tuning.archive_tile)
    check_tiles(raw.block, tuning.recent_tile)
    shared: dict[str, Any] = {
        "GROUP": group,
        "ROWS": row_count(group),
        "DIM": head_dim,
        "HAS_CAP": has_cap,
        "OVERLAP": overlap,
    }
    # A merge with a basis fills half a multiprocessor, so that it finds room only when split
    # programs end; one without would wait where they could run (docs/performance.md).
    split = {
        **shared,
        **_constants("A", archive),
        **_constants("R", raw),
        "A_TILE": tuning.archive_tile,
        "A_PERMUTED": archive.permuted,
        "R_TILE": tuning.recent_tile,
        "CHUNK_FIELDS": CHUNK_FIELDS,
        "DTYPE": triton_dtype(dtype),
        "INTERPRET": interpreted(),
        "EARLY": has_basis,
    }
    # Few programs: one per query head, so that many read a sequence's many chunks. Many
    # programs: one per KV head, so that the basis is read once for its query heads.
    alone = batch * kv_heads <= FEW_MERGES
    merge = {
        **shared,
        "DROPPED": dropped_columns(layout.v_bands),
        "MERGED": 1 if alone else row_count(group),
        "WIDTH": triton.next_power_of_2(head_dim),
        "STEP": 32 if alone else 1,
        "SPAN_FIELDS": SPAN_FIELDS,
        "HAS_BASIS": has_basis,
        "PRECISION": _basis_precision(dtype),
    }
    return (
        Launch(split_kernel, split, _options(tuning) | launch_options(overlap)),
        Launch(merge_kernel, merge, {"num_warps": 4} | launch_options(overlap)),
    )


def _basis_precision(dtype: torch.dtype) -> str:
    """Of the product with V's basis: tf32 keeps 11 bits, more than a bfloat16 result."""
    if interpreted():
        return "ieee"
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def _constants(prefix: str, part: Part) -> dict[str, object]:
    return {f"{prefix}_AT": part.offsets, f"{prefix}_K": part.k, f"{prefix}_V": part.v}


def _options(tuning: Tuning) -> dict[str, int]:
    options: dict[str, int] = {"num_warps": tuning.warps, "num_stages": tuning.stages}
    if tuning.registers:
        options["maxnreg"] = tuning.registers
    return options


def _rotate(query: torch.Tensor, basis: torch.Tensor, workspace: DecodeWorkspace) -> torch.Tensor:
    """(batch, kv_heads, group, head_dim) float32 queries in K's component space."""
    batch, heads, head_dim = query.shape
    kv_heads = len(basis)
    group = heads // kv_heads
    rotated = workspace.rotated[:, : batch * group]
    rows = 16 if batch * kv_heads <= FEW_MERGES else 64
    grid = triton.cdiv(batch * group, rows), kv_heads, triton.cdiv(head_dim, ROTATED_COLUMNS)
    overlap = overlaps()
    rotate_kernel[grid](
        *(query, basis, rotated, batch * group),
        *(query.stride(0), query.stride(1), rotated.stride(0), rotated.stride(1)),
        *basis.stride(),
        GROUP=group,
        ROWS=rows,
        DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        COLUMNS=ROTATED_COLUMNS,
        PRECISION="ieee" if interpreted() else "tf32x3",
        OVERLAP=overlap,
        num_warps=4,
        **launch_options(overlap),
    )
    return rotated.unflatten(1, (batch, group)).transpose(0, 1)
