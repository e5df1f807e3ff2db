"""A step on a GPU: what the host knows of it, and where the device finds the rest.

Decoding sequences come first in a batch and have one new token each; their lengths are read
on the device alone, so a CUDA graph serves every step. Prefilling sequences follow; the host
knows their lengths exactly and groups them so that each group's context fits the workspace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from vllm_kvpca.pages.boundary import Policy


@dataclass(frozen=True)
class PrefillGroup:
    """Prefilling sequences that attend together.

    Attributes:
        rows: their rows in the batch; tokens: their new tokens.
        max_new, max_length: tokens of the longest: new ones, and with those before.
        context: whether any of them has tokens computed in earlier steps.
    """

    rows: slice
    tokens: slice
    max_new: int
    max_length: int
    context: bool


@dataclass(frozen=True)
class DevicePrefill:
    """A group with its offsets on the device, each (sequences + 1,) int32.

    Attributes:
        query_start: first new token of each sequence within the group's tokens.
        key_start: first key of each sequence: within the workspace if the group has context,
            else the same as query_start.
    """

    group: PrefillGroup
    query_start: torch.Tensor
    key_start: torch.Tensor


@dataclass(frozen=True)
class DeviceStep:
    """What the layers need of a step; all tensors on the device, int32.

    Attributes:
        decodes: sequences with one new token, at the beginning of the batch.
        prefills: the others.
        query_start: (batch + 1,) first new token of each sequence.
        lengths: (batch,) computed plus new tokens; 0 in padding rows.
        starts: (batch,) archived tokens before the step.
        busy: the sequences that archive something, see ops.starts.kernel.list_busy.
        slots: (tokens,) where each new token's raw K and V go.
        recent_table, archive_table: (batch, width) block ids; 0 is the null block.
        policy: where the boundary lies.
        planned: for what the decode workspaces (by id) hold this step's list of chunks.
    """

    policy: Policy
    decodes: int
    prefills: tuple[DevicePrefill, ...]
    query_start: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    busy: torch.Tensor
    slots: torch.Tensor
    recent_table: torch.Tensor
    archive_table: torch.Tensor
    planned: dict[int, object] = field(default_factory=dict)

    @property
    def max_new(self) -> int:
        """New tokens of the longest sequence."""
        return max((prefill.group.max_new for prefill in self.prefills), default=1)


def on_device(
    group: PrefillGroup, query_start: torch.Tensor, lengths: torch.Tensor
) -> DevicePrefill:
    """Offsets of a group, from the batch's tensors and without waiting for them."""
    rows = group.rows
    local = query_start[rows.start : rows.stop + 1] - group.tokens.start
    if not group.context:
        return DevicePrefill(group, local, local)
    ends = lengths[rows].cumsum(0, dtype=torch.int32)
    return DevicePrefill(group, local, torch.nn.functional.pad(ends, (1, 0)))


def group_prefills(
    query_start: Sequence[int], lengths: Sequence[int], first: int, room: int
) -> tuple[PrefillGroup, ...]:
    """Groups of neighbouring sequences, from row `first` on, of at most `room` tokens each.

    A sequence without context needs no room: it attends to its own new tokens.

    Args:
        query_start: first new token of each sequence, and their end.
        lengths: computed plus new tokens of each sequence.
        room: tokens of the workspace; no sequence is longer.
    """
    groups: list[PrefillGroup] = []
    begin, used = first, 0
    for row in range(first, len(lengths)):
        if row > begin and used + lengths[row] > room:
            groups.append(_group(query_start, lengths, begin, row))
            begin, used = row, 0
        used += lengths[row]
    if begin < len(lengths):
        groups.append(_group(query_start, lengths, begin, len(lengths)))
    return tuple(groups)


def _group(
    query_start: Sequence[int], lengths: Sequence[int], begin: int, end: int
) -> PrefillGroup:
    new = [query_start[row + 1] - query_start[row] for row in range(begin, end)]
    return PrefillGroup(
        rows=slice(begin, end),
        tokens=slice(query_start[begin], query_start[end]),
        max_new=max(new),
        max_length=max(lengths[begin:end]),
        context=any(length > count for length, count in zip(lengths[begin:end], new, strict=True)),
    )
