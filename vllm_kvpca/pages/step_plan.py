"""StepPlan: where each token of a step lies. Made once per step, read by every layer and op.

Rows are query tokens. Sequence i owns the rows [query_start[i], query_start[i + 1]) of a step; it
has lengths[i] tokens with them, and before the step [0, starts[i]) are archived and the rest of
what was computed is raw:

    start = min(n, max(boundary(n), leading null rows * raw_block rounded up to archive_block))

with n computed tokens. The second term is for a prefix-cache hit that begins with archived tokens
in a sequence that is still short: its raw rows are null there. (Rounded up, because archived parts
end with a block, and the raw block in which they end is not null.)

All tensors lie on the device that computes, at addresses that do not change from step to step
where a CUDA graph is to replay it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from vllm_kvpca.pages.layer_plan import LayerPlan

_T = TypeVar("_T")


@dataclass(frozen=True)
class StepTokens:
    """A step's new tokens in one layer.

    Attributes:
        query, output: (rows, heads, head_dim).
        key, value: (rows, kv_heads, head_dim).
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor


@dataclass(frozen=True)
class PrefillGroup:
    """Prefilling sequences that attend together.

    Attributes:
        sequences: their places in the step; rows: their new tokens.
        max_new, max_length: tokens of the longest: new ones, and with those before.
        context: whether any of them has tokens computed in earlier steps.
        query_start: (sequences + 1,) int32, first new token of each within the group's rows.
        key_start: the same of their keys: whole sequences one after another if the group has
            context, else the same as query_start.
    """

    sequences: slice
    rows: slice
    max_new: int
    max_length: int
    context: bool
    query_start: torch.Tensor
    key_start: torch.Tensor


@dataclass(frozen=True)
class StepPlan:
    """What the ops need to know of a step.

    Attributes:
        layer: the plan of the layers that this step's pages belong to.
        query_start: (sequences + 1,) int32, first row of each sequence.
        lengths: (sequences,) int32, computed plus new tokens; 0 in padding.
        starts: (sequences,) int32, archived tokens before the step.
        busy: (1 + sequences,) int32 or longer: how many sequences archive something in this step,
            then which.
        slots: (rows,) raw slot of each new token, block * raw_block + offset; a slot in the null
            block 0 (or below) is nowhere.
        recent_table, archive_table: (sequences, width) int32 block ids; 0 is the null block.
        decodes: sequences at the beginning that have one row each.
        prefills: the others, in groups. Without any, `attend` takes all sequences alike.
        chunks: where the decode kernel lists its work; None where it does not run.
    """

    layer: LayerPlan
    query_start: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    busy: torch.Tensor
    slots: torch.Tensor
    recent_table: torch.Tensor
    archive_table: torch.Tensor
    decodes: int = 0
    prefills: tuple[PrefillGroup, ...] = ()
    chunks: Any = None
    _shared: dict[str, Any] = field(default_factory=dict)

    @property
    def max_new(self) -> int:
        """New tokens of the longest sequence."""
        return max((group.max_new for group in self.prefills), default=1)

    def once(self, name: str, make: Callable[[], _T]) -> _T:
        """What the first layer of a step works out for all layers."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]


def group_prefills(
    query_start: Sequence[int],
    lengths: Sequence[int],
    first: int,
    room: int,
    on_device: tuple[torch.Tensor, torch.Tensor],
) -> tuple[PrefillGroup, ...]:
    """Groups of neighbouring sequences, from sequence `first` on, of at most `room` tokens each.

    A group without any context needs no room: its sequences attend to their own new tokens.

    Args:
        query_start: first new token of each sequence, and their end; exact, on the host.
        lengths: computed plus new tokens of each sequence.
        room: tokens of the workspace; no sequence is longer.
        on_device: query_start and lengths as tensors; nothing waits for them.
    """
    groups: list[PrefillGroup] = []
    begin, used = first, 0
    for row in range(first, len(lengths)):
        if row > begin and used + lengths[row] > room:
            groups.append(_group(query_start, lengths, begin, row, on_device))
            begin, used = row, 0
        used += lengths[row]
    if begin < len(lengths):
        groups.append(_group(query_start, lengths, begin, len(lengths), on_device))
    return tuple(groups)


def _group(
    query_start: Sequence[int],
    lengths: Sequence[int],
    begin: int,
    end: int,
    on_device: tuple[torch.Tensor, torch.Tensor],
) -> PrefillGroup:
    new = [query_start[row + 1] - query_start[row] for row in range(begin, end)]
    context = any(length > count for length, count in zip(lengths[begin:end], new, strict=True))
    local = on_device[0][begin : end + 1] - query_start[begin]
    ends = on_device[1][begin:end].cumsum(0, dtype=torch.int32) if context else None
    return PrefillGroup(
        sequences=slice(begin, end),
        rows=slice(query_start[begin], query_start[end]),
        max_new=max(new),
        max_length=max(lengths[begin:end]),
        context=context,
        query_start=local,
        key_start=local if ends is None else torch.nn.functional.pad(ends, (1, 0)),
    )
