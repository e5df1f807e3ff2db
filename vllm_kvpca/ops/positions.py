"""Positions of a step's sequences, and the slots that block tables give them.

Slots address tokens in a cache: slot = block * block_size + offset; -1 means "nowhere".
Block 0 is the null block: it belongs to nobody.
"""

from __future__ import annotations

import torch


def ranges(begins: torch.Tensor, ends: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sequence, position) of every position in [begins_i, ends_i), sequence by sequence."""
    counts = (ends - begins).clamp_min(0).long()
    sequence = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    within = torch.arange(len(sequence), device=counts.device) - first[sequence]
    return sequence, begins[sequence] + within


def table_slots(
    table: torch.Tensor,
    sequence: torch.Tensor,
    position: torch.Tensor,
    block_size: int,
    null: int = -1,
) -> torch.Tensor:
    """Slots of positions by a block table; `null` in place of slots of the null block 0."""
    ids = table[sequence, position // block_size].long()
    return torch.where(ids > 0, ids * block_size + position % block_size, null)
