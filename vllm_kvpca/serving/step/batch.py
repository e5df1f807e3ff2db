"""Where each token of a step lies: computed once per step, used by every layer.

Sequence i of a step has n_i computed and q_i new tokens, s_i = n_i + q_i. Before the step
[0, start_i) is archived and [start_i, n_i) raw; the step archives [start_i, boundary(s_i)).

    start_i = min(n_i, max(boundary(n_i), leading null rows * raw_block rounded up to align))

because a prefix-cache hit may begin with archived tokens in a sequence that is still short:
its raw rows are null there. (Rounded up, because archived parts end with a block, and the raw
block in which they end is not null.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch

from vllm_kvpca.pages.boundary import Policy


@dataclass(frozen=True)
class StepInput:
    """A step as vLLM describes it; all tensors are integers on the host.

    Attributes:
        query_start: (sequences + 1,) first new token of each sequence.
        lengths: (sequences,) computed plus new tokens.
        recent_table, archive_table: (sequences, width) block ids; 0 is the null block.
        recent_block, archive_block: tokens per block.
    """

    query_start: torch.Tensor
    lengths: torch.Tensor
    recent_table: torch.Tensor
    archive_table: torch.Tensor
    recent_block: int
    archive_block: int
    policy: Policy


@dataclass(frozen=True)
class ArchiveWork:
    """Tokens that a step archives: their source and their archive slot.

    Attributes:
        recent_slots: (a,) source slots in recent pages.
        new_tokens: (b,) source indices among the step's new tokens.
        slots: (a + b,) destinations, first those of recent_slots.
    """

    recent_slots: torch.Tensor
    new_tokens: torch.Tensor
    slots: torch.Tensor


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


@dataclass(frozen=True)
class Step:
    """Everything the layers need: store, then archive, then attend."""

    store_slots: torch.Tensor
    archive: ArchiveWork | None
    buckets: list[Bucket]

    def to(self, device: torch.device) -> Step:
        """The same work with all tensors on one device."""
        return Step(
            self.store_slots.to(device),
            _to(self.archive, device) if self.archive is not None else None,
            [_to(bucket, device) for bucket in self.buckets],
        )


_T = TypeVar("_T", ArchiveWork, Bucket)


def _to(work: _T, device: torch.device) -> _T:
    tensors = {
        field.name: value.to(device)
        for field in fields(work)
        if (value := getattr(work, field.name)) is not None
    }
    return replace(work, **tensors)


def plan_step(step: StepInput) -> Step:
    """Work of one step. Sequences without new tokens (padding) are passed over."""
    queries = step.query_start.diff()
    active = (queries > 0).nonzero().squeeze(-1)
    first_token = step.query_start[:-1][active].long()
    queries, lengths = queries[active].long(), step.lengths[active].long()
    recent, archived = step.recent_table[active].long(), step.archive_table[active].long()
    computed = lengths - queries
    start = starts(recent, computed, step.recent_block, step.policy)
    sequence, position = _ragged(computed, lengths)
    return Step(
        store_slots=_slots(recent, sequence, position, step.recent_block),
        archive=_archive_work(step, recent, archived, first_token, computed, start, lengths),
        buckets=_buckets(step, recent, archived, first_token, queries, computed, start),
    )


def starts(
    recent: torch.Tensor, computed: torch.Tensor, block: int, policy: Policy
) -> torch.Tensor:
    """Tokens of each sequence that are archived before the step; see the module."""
    null = _leading_nulls(recent, computed, block) * block
    archived = -(-null // policy.align) * policy.align
    return torch.minimum(computed, torch.maximum(policy.boundaries(computed), archived))


def _leading_nulls(table: torch.Tensor, computed: torch.Tensor, block: int) -> torch.Tensor:
    """Null rows at the beginning of each sequence's computed part."""
    rows = -(-computed // block)
    null = (table == 0) & (torch.arange(table.shape[1])[None, :] < rows[:, None])
    return null.long().cumprod(1).sum(1)


def _ragged(first: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, position) of every position in [first_i, last_i), sequence by sequence."""
    counts = (last - first).clamp_min(0)
    sequence = torch.repeat_interleave(torch.arange(len(counts)), counts)
    begin = counts.cumsum(0) - counts
    return sequence, torch.arange(len(sequence)) - begin[sequence] + first[sequence]


def _slots(
    table: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, block: int
) -> torch.Tensor:
    """Slots of positions; -1 where the row is the null block."""
    ids = table[sequence, position // block]
    return torch.where(ids > 0, ids * block + position % block, -1)


def _archive_work(
    step: StepInput,
    recent: torch.Tensor,
    archived: torch.Tensor,
    first_token: torch.Tensor,
    computed: torch.Tensor,
    start: torch.Tensor,
    lengths: torch.Tensor,
) -> ArchiveWork | None:
    end = step.policy.boundaries(lengths)
    old = _ragged(start, torch.minimum(end, computed))
    new = _ragged(torch.maximum(start, computed), end)
    if not len(old[0]) and not len(new[0]):
        return None
    sequence, position = (torch.cat(pair) for pair in zip(old, new, strict=True))
    return ArchiveWork(
        recent_slots=_slots(recent, *old, step.recent_block),
        new_tokens=first_token[new[0]] + new[1] - computed[new[0]],
        slots=_slots(archived, sequence, position, step.archive_block),
    )


def _buckets(
    step: StepInput,
    recent: torch.Tensor,
    archived: torch.Tensor,
    first_token: torch.Tensor,
    queries: torch.Tensor,
    computed: torch.Tensor,
    start: torch.Tensor,
) -> list[Bucket]:
    archive_rows = -(-start // step.archive_block)
    recent_first = start // step.recent_block
    recent_rows = torch.where(computed > start, -(-computed // step.recent_block) - recent_first, 0)
    buckets = []
    sizes = torch.stack([_size_class(x) for x in (queries, archive_rows, recent_rows)], 1)
    _, members = torch.unique(sizes, dim=0, return_inverse=True)
    for group in range(int(members.max()) + 1 if len(members) else 0):
        rows = (members == group).nonzero().squeeze(-1)
        column = torch.arange(int(queries[rows].max()))[None, :]
        valid = column < queries[rows][:, None]
        tokens = first_token[rows][:, None] + torch.minimum(column, queries[rows][:, None] - 1)
        width = int(archive_rows[rows].max())
        buckets.append(
            Bucket(
                tokens=tokens,
                valid=valid,
                archive_table=archived[rows, :width] if width else None,
                archive_lengths=start[rows],
                recent_table=_window(recent, rows, recent_first, recent_rows),
                recent_lengths=(computed - start)[rows],
                recent_skips=(start % step.recent_block)[rows],
            )
        )
    return buckets


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
    column = torch.arange(width)[None, :]
    index = (first[rows][:, None] + column).clamp_max(table.shape[1] - 1)
    ids = table[rows[:, None], index]
    return torch.where(column < count[rows][:, None], ids, 0)
