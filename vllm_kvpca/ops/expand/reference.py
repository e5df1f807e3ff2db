"""Expand in plain torch."""

from __future__ import annotations

import torch

from vllm_kvpca.codec.bands import narrow
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.positions import ranges, table_slots
from vllm_kvpca.ops.store.reference import load_recent
from vllm_kvpca.pages.step_plan import PrefillGroup, StepPlan, StepTokens


def expand(
    step: StepPlan,
    group: PrefillGroup,
    tokens: StepTokens,
    cache: LayerCache,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> None:
    """K and V of whole sequences in head space, one sequence after another.

    Sequence i of the group fills rows [key_start[i], key_start[i] + lengths[i]): positions
    [0, starts[i]) from the archive, then recent tokens, then the step's new ones.

    Args:
        out_k, out_v: (rows, kv_heads, head_dim) in the model's dtype; other rows are left as
            they are.
    """
    plan, codec, members = cache.codec.layout, cache.codec, group.sequences
    lengths, starts = step.lengths[members], step.starts[members]
    query_start = step.query_start[members.start : members.stop + 1]
    computed, offsets = lengths - query_start.diff(), group.key_start

    sequence, position = ranges(torch.zeros_like(starts), starts)
    table = step.archive_table[members]
    slots = table_slots(table, sequence, position, plan.block_size, null=0)
    block, offset = slots // plan.block_size, slots % plan.block_size
    rows = offsets[sequence] + position
    for which, out, scales_at in (("k", out_k, plan.k_scales), ("v", out_v, plan.v_scales)):
        codes = plan.load_codes(cache.pages, which, block, offset)
        scales = plan.scales(cache.pages, scales_at)[block, :, offset]
        components = codec.decode(codes, scales, which)
        out[rows] = narrow(codec.restore(components, which, position), out.dtype)

    sequence, position = ranges(starts, computed)
    rows = offsets[sequence] + position
    slots = table_slots(
        step.recent_table[members], sequence, position, step.layer.raw_block, null=0
    )
    out_k[rows], out_v[rows] = load_recent(cache.recent, slots)

    sequence, position = ranges(computed, lengths)
    rows = offsets[sequence] + position
    new = query_start[sequence] + position - computed[sequence]
    out_k[rows], out_v[rows] = tokens.key[new], tokens.value[new]
