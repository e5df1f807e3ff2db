"""Sequences with block tables, and the dense attention that their steps must give."""

from __future__ import annotations

import torch

from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.preset import FORMATS, Preset

HEAD_DIM, KV_HEADS, GROUP = 64, 2, 3
RAW_BLOCK, ARCHIVE_BLOCK = 32, 48
SCALE = 0.125


class PagedSequence:
    """One sequence with block tables as the managers hand them out."""

    def __init__(self, total: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self.key, self.value = torch.randn(2, total, KV_HEADS, HEAD_DIM).to(dtype)
        self.query = torch.randn(total, KV_HEADS * GROUP, HEAD_DIM).to(dtype)
        self.computed = 0
        self.recent: list[int] = []
        self.archive: list[int] = []

    def grow(self, new: int, policy: Policy, free: list[int]) -> None:
        length = self.computed + new
        archived = policy.boundary(length)
        for row in range(len(self.recent), -(-length // RAW_BLOCK)):
            self.recent.append(free.pop() if row >= archived // RAW_BLOCK else 0)
        for _ in range(len(self.archive), -(-archived // ARCHIVE_BLOCK)):
            self.archive.append(free.pop())

    def expected(self, new: int) -> torch.Tensor:
        """(new, heads, dim) float64: dense causal attention of the new tokens."""
        length = self.computed + new
        key = self.key[:length].double().repeat_interleave(GROUP, 1).transpose(0, 1)
        value = self.value[:length].double().repeat_interleave(GROUP, 1).transpose(0, 1)
        query = self.query[self.computed : length].double().transpose(0, 1)
        scores = query @ key.transpose(1, 2) * SCALE
        hidden = torch.ones(new, length).triu(self.computed + 1).bool()
        return (scores.masked_fill(hidden, -1e300).softmax(-1) @ value).transpose(0, 1)


def make_layer(
    name: str, thresholds: tuple[int, int], dtype: torch.dtype
) -> tuple[LayerPlan, LayerCodec]:
    """Plan and codec of a layer that stores its cache in a calibration-free format."""
    preset = Preset(name, FORMATS[name])
    plan = LayerPlan(preset.streams(HEAD_DIM), dtype, RAW_BLOCK, ARCHIVE_BLOCK, *thresholds)
    k, v = (preset.basis(which, 0, list(range(KV_HEADS)), HEAD_DIM) for which in "kv")
    return plan, LayerCodec(plan.archive, k, v, dtype)


def table(rows: list[list[int]]) -> torch.Tensor:
    width = max(1, *(len(row) for row in rows)) + 2
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)


def step_tables(
    sequences: list[PagedSequence], counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """query_start, lengths and both block tables of a step, int32."""
    lengths = [s.computed + n for s, n in zip(sequences, counts, strict=True)]
    return (
        torch.tensor([0, *counts]).cumsum(0).int(),
        torch.tensor(lengths, dtype=torch.int32),
        table([s.recent for s in sequences]),
        table([s.archive for s in sequences]),
    )


def step_tokens(
    sequences: list[PagedSequence], counts: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value of each sequence's next tokens."""
    spans = [slice(s.computed, s.computed + n) for s, n in zip(sequences, counts, strict=True)]
    query, key, value = (
        torch.cat([getattr(s, name)[span] for s, span in zip(sequences, spans, strict=True)])
        for name in ("query", "key", "value")
    )
    return query, key, value
