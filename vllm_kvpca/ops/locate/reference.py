"""Starts in plain torch."""

from __future__ import annotations

import torch

from vllm_kvpca.pages.layer_plan import LayerPlan


def locate(
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    recent_table: torch.Tensor,
    plan: LayerPlan,
    starts: torch.Tensor,
    busy: torch.Tensor,
) -> None:
    """Where each sequence's archived part ends before the step, and which of them archive.

    Args:
        query_start, lengths, recent_table: see pages.step_plan.StepPlan.
        starts: (sequences,) int32, filled. busy: (1 + sequences,) or more int32, filled.
    """
    computed = (lengths - query_start.diff()).clamp_min(0)
    policy, block = plan.policy, plan.raw_block
    null = _leading_nulls(recent_table, computed, block) * block
    archived = -(-null // policy.align) * policy.align
    starts.copy_(torch.minimum(computed, torch.maximum(policy.boundaries(computed), archived)))
    listed = (policy.boundaries(lengths) > starts).nonzero().squeeze(-1)
    busy[0] = len(listed)
    busy[1 : 1 + len(listed)] = listed


def _leading_nulls(table: torch.Tensor, computed: torch.Tensor, block: int) -> torch.Tensor:
    """Null rows at the beginning of each sequence's computed part."""
    rows = -(-computed // block)
    inside = torch.arange(table.shape[1], device=table.device)[None, :] < rows[:, None]
    return ((table == 0) & inside).long().cumprod(1).sum(1)
