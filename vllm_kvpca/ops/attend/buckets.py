"""Sequences of similar size, padded to each other: how plain torch attends to a step."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvpca.pages.step_plan import StepPlan


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar size that attend together, padded to the largest of them.

    Attributes:
        tokens: (batch, queries) index of each new token; padding repeats the last one.
        valid: (batch, queries) whether a position is a real token.
        archive_table, recent_table: (batch, width) block ids, or None if none has any.
        archive_lengths, recent_lengths: (batch,) tokens in each part.
        recent_skips: (batch,) archived tokens in the first raw block.
    """

    tokens: torch.Tensor
    valid: torch.Tensor
    archive_table: torch.Tensor | None
    archive_lengths: torch.Tensor
    recent_table: torch.Tensor | None
    recent_lengths: torch.Tensor
    recent_skips: torch.Tensor


def buckets(step: StepPlan) -> list[Bucket]:
    """All sequences of a step that have new tokens (padding has none)."""
    new = step.query_start.diff()
    active = (new > 0).nonzero().squeeze(-1)
    if not len(active):
        return []
    plan = step.layer
    new, start = new[active].long(), step.starts[active].long()
    first_token = step.query_start[:-1][active].long()
    computed = step.lengths[active].long() - new
    recent, archived = step.recent_table[active].long(), step.archive_table[active].long()
    archive_rows = -(-start // plan.archive_block)
    first = start // plan.raw_block
    recent_rows = torch.where(computed > start, -(-computed // plan.raw_block) - first, 0)
    sizes = torch.stack([_size_class(x) for x in (new, archive_rows, recent_rows)], 1)
    _, members = torch.unique(sizes, dim=0, return_inverse=True)
    made = []
    for group in range(int(members.max()) + 1):
        rows = (members == group).nonzero().squeeze(-1)
        column = torch.arange(int(new[rows].max()), device=new.device)[None, :]
        last = new[rows][:, None] - 1
        width = int(archive_rows[rows].max())
        made.append(
            Bucket(
                tokens=first_token[rows][:, None] + torch.minimum(column, last),
                valid=column <= last,
                archive_table=archived[rows, :width] if width else None,
                archive_lengths=start[rows],
                recent_table=_window(recent, rows, first, recent_rows),
                recent_lengths=(computed - start)[rows],
                recent_skips=(start % plan.raw_block)[rows],
            )
        )
    return made


def _size_class(size: torch.Tensor) -> torch.Tensor:
    """0, 1, 2, 3-4, 5-8, ...: sequences of one class waste at most half of the padding."""
    return torch.where(size > 0, 1 + torch.ceil(torch.log2(size.clamp_min(1).float())).long(), 0)


def _window(
    table: torch.Tensor, rows: torch.Tensor, first: torch.Tensor, count: torch.Tensor
) -> torch.Tensor | None:
    """Block ids [first_i, first_i + count_i) of some rows, padded with the null block."""
    width = int(count[rows].max())
    if not width:
        return None
    column = torch.arange(width, device=table.device)[None, :]
    index = (first[rows][:, None] + column).clamp_max(table.shape[1] - 1)
    ids = table[rows[:, None], index]
    return torch.where(column < count[rows][:, None], ids, 0)
