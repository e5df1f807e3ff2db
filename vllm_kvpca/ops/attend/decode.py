"""Decode attention on a GPU: one new token per sequence over archive, recent and itself.

Once per step, list_chunks lists chunks of the two caches (chunks). Then, in every
layer, split-KV programs attend to a chunk each (split), and one kernel merges a
sequence's chunks, rotates V's components back to head space, once per query head, and adds
the new token (merge). With a basis for K, queries are rotated before (rotate).
The host reads nothing back and its launches depend on shapes alone, so all of it can be
captured in a CUDA graph.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton

from vllm_kvpca.codec.key_bias import RUN
from vllm_kvpca.ops.attend.chunks import CHUNK_FIELDS, LISTED, SPAN_FIELDS, chunks_kernel
from vllm_kvpca.ops.attend.merge import merge_kernel
from vllm_kvpca.ops.attend.pieces import (
    COST_BYTES,
    ChunkLists,
    DecodeWorkspace,
    Part,
    Tuning,
    archive_part,
    check_tiles,
    dropped_columns,
    make_chunks,
    make_workspace,
    recent_part,
    row_count,
)
from vllm_kvpca.ops.attend.products import triton_dtype
from vllm_kvpca.ops.attend.rotate import rotate_kernel
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.attend.split import split_kernel
from vllm_kvpca.ops.dependent_launch import interpreted, launch_options, overlaps
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.pages.layout import ArchiveLayout
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens

__all__ = [
    "ChunkLists",
    "DecodeWorkspace",
    "Tuning",
    "decode",
    "list_chunks",
    "make_chunks",
    "make_workspace",
]

LOG2E = 1.4426950408889634
LEAST_TOKENS = 64
"""Raw tokens' worth of bytes below which a chunk does not pay for its merge."""
FEW_MERGES = 32
"""Sequences times KV heads up to which the merge takes query heads one by one."""
ROTATED_COLUMNS = 32
"""Components that a program of the rotation makes."""


def decode(
    step: StepPlan,
    tokens: StepTokens,
    cache: LayerCache,
    softmax: Softmax,
    workspace: DecodeWorkspace,
) -> None:
    """Attention of the step's decoding sequences, one new token each, into `tokens.output`.

    Tokens [0, start) are read from the archive, [start, length - 1) from recent pages, and the
    new one from `tokens`, whether the cache has it already or not. Of padding (length 0) nothing
    is read, and its output is 0.

    Args:
        workspace: from make_workspace, for at least so many sequences.
    """
    batch = step.decodes
    if not batch:
        return
    step.once("decode chunks", lambda: list_chunks(step, workspace))
    query, key, value, out = (
        x[:batch] for x in (tokens.query, tokens.key, tokens.value, tokens.output)
    )
    recent, pages, codec = cache.recent, cache.pages, cache.codec
    heads, head_dim = query.shape[1:]
    kv_heads = key.shape[1]
    group, tuning = heads // kv_heads, workspace.tuning
    if codec.k_basis is None:
        rotated = query.unflatten(1, (kv_heads, group))
    else:
        tables = codec.k_tables
        matrix = codec.k_basis if tables is None else tables.query_matrix
        rotated = _rotate(query, matrix, workspace)
    angles = None if codec.k_tables is None else codec.k_tables.angles
    scale, soft_cap = softmax
    split, merge = _launches(
        codec.layout, head_dim, step.layer.raw_block, group, batch, kv_heads,
        codec.v_basis is not None, query.dtype, bool(soft_cap), tuning, overlaps(),
    )  # fmt: skip
    common = (
        *(workspace.sums, workspace.maxima, workspace.weights),
        *(scale if soft_cap else scale * LOG2E, float(soft_cap or 0.0)),
    )
    recent_bytes = recent.view(torch.uint8)
    recent_table, archive_table = step.recent_table, step.archive_table
    split_kernel[(kv_heads, workspace.target + 2 * batch)](
        *(query, rotated, recent_bytes, pages, recent_table, archive_table, step.chunks.chunks),
        angles,
        *common,
        *(query.stride(0), query.stride(1)),
        *rotated.stride()[:3],
        *(recent_bytes.stride(0), recent_bytes.stride(1), pages.stride(0), pages.stride(1)),
        *(recent_table.stride(0), archive_table.stride(0)),
        **split.constants,
        **split.options,
    )
    merge_kernel[(batch, kv_heads, -(-group // merge.constants["MERGED"]))](
        *(query, key, value, out, codec.v_basis, step.lengths, step.chunks.spans, kv_heads),
        *common,
        *(query.stride(0), query.stride(1), key.stride(0), key.stride(1)),
        *(value.stride(0), value.stride(1), out.stride(0), out.stride(1)),
        *((0, 0, 0) if codec.v_basis is None else codec.v_basis.stride()),
        **merge.constants,
        **merge.options,
    )


def list_chunks(step: StepPlan, workspace: DecodeWorkspace) -> None:
    """List in `step.chunks` which program attends to what, for all layers of the step."""
    layer, lists = step.layer, step.chunks
    tuning, capacity = workspace.tuning, len(lists.chunks)
    archive, raw = archive_part(layer.archive), recent_part(layer.head_dim, layer.raw_block)
    chunks_kernel[(triton.cdiv(capacity, LISTED),)](
        *(step.starts, step.lengths, lists.chunks, lists.spans),
        *(step.decodes, capacity, workspace.target),
        LEAST_TOKENS * layer.raw_token_bytes // COST_BYTES,
        A_COST=archive.cost,
        A_TILE=tuning.archive_tile,
        R_COST=raw.cost,
        R_TILE=tuning.recent_tile,
        BATCH=triton.next_power_of_2(len(lists.spans)),
        LISTED=LISTED,
        CHUNK_FIELDS=CHUNK_FIELDS,
        SPAN_FIELDS=SPAN_FIELDS,
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
    assert RUN % tuning.archive_tile == 0, "a tile lies in one run"
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
        "RUN": RUN,
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
    """(batch, kv_heads, group, made) float32 queries in K's component space, and what else
    `basis`, (kv_heads, head_dim, made), makes of them."""
    batch, heads, head_dim = query.shape
    kv_heads, _, made = basis.shape
    group = heads // kv_heads
    rotated = workspace.rotated[:, : batch * group, :made]
    rows = 16 if batch * kv_heads <= FEW_MERGES else 64
    grid = triton.cdiv(batch * group, rows), kv_heads, triton.cdiv(made, ROTATED_COLUMNS)
    overlap = overlaps()
    rotate_kernel[grid](
        *(query, basis, rotated, batch * group),
        *(query.stride(0), query.stride(1), rotated.stride(0), rotated.stride(1)),
        *basis.stride(),
        GROUP=group,
        ROWS=rows,
        DIM=head_dim,
        WIDTH=triton.next_power_of_2(head_dim),
        MADE=made,
        COLUMNS=ROTATED_COLUMNS,
        PRECISION="ieee" if interpreted() else "tf32x3",
        OVERLAP=overlap,
        num_warps=4,
        **launch_options(overlap),
    )
    return rotated.unflatten(1, (batch, group)).transpose(0, 1)
