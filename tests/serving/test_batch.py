"""Steps of random sequences, planned and run, against dense attention over raw tokens.

With the format `raw` the archive holds the same numbers as the recent pages, so whatever
split of a sequence into parts must give what attention over the whole sequence gives.
"""

from __future__ import annotations

import random

import pytest
import torch

from vllm_kvpca.codec.policy import Policy
from vllm_kvpca.kernels.layer_codec import LayerCodec
from vllm_kvpca.preset import FORMATS, Preset
from vllm_kvpca.serving.batch import StepInput, plan_step
from vllm_kvpca.serving.step import StepTokens, run_step

HEAD_DIM, KV_HEADS, GROUP = 64, 2, 3
RAW_BLOCK, ARCHIVE_BLOCK = 32, 48


class PagedSequence:
    """One sequence with block tables as the managers hand them out."""

    def __init__(self, total: int) -> None:
        self.key, self.value = torch.randn(2, total, KV_HEADS, HEAD_DIM).bfloat16()
        self.query = torch.randn(total, KV_HEADS * GROUP, HEAD_DIM).bfloat16()
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
        scores = query @ key.transpose(1, 2) * 0.125
        hidden = torch.ones(new, length).triu(self.computed + 1).bool()
        return (scores.masked_fill(hidden, -1e300).softmax(-1) @ value).transpose(0, 1)


def table(rows: list[list[int]]) -> torch.Tensor:
    width = max(1, *(len(row) for row in rows)) + 2
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


def run(sequences, counts, policy, recent_pages, archive_pages, codec):
    """Plan and run one step; returns the outputs of all new tokens."""
    query_start = torch.tensor([0, *counts]).cumsum(0)
    step = plan_step(
        StepInput(
            query_start=query_start,
            lengths=torch.tensor([s.computed + n for s, n in zip(sequences, counts, strict=True)]),
            recent_table=table([s.recent for s in sequences]),
            archive_table=table([s.archive for s in sequences]),
            recent_block=RAW_BLOCK,
            archive_block=ARCHIVE_BLOCK,
            policy=policy,
        )
    )
    spans = [slice(s.computed, s.computed + n) for s, n in zip(sequences, counts, strict=True)]
    query, key, value = (
        torch.cat([getattr(s, name)[span] for s, span in zip(sequences, spans, strict=True)])
        for name in ("query", "key", "value")
    )
    output = torch.full(query.shape, float("nan"))
    tokens = StepTokens(query, key, value, output)
    run_step(step, tokens, recent_pages, archive_pages, codec, 0.125)
    return output.split(counts)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("thresholds", [(96, 48), (0, 0), (64, 64)])
def test_random_steps_equal_dense_attention(seed, thresholds):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    policy = Policy(*thresholds, align=96)
    preset = Preset("raw", FORMATS["raw"])
    codec = LayerCodec(preset.layout(HEAD_DIM, ARCHIVE_BLOCK), None, None, torch.bfloat16)
    blocks = 200
    recent = torch.full((blocks, KV_HEADS, RAW_BLOCK, 2 * HEAD_DIM), float("nan")).bfloat16()
    archive = torch.randint(0, 256, (blocks, KV_HEADS, codec.layout.head_bytes), dtype=torch.uint8)
    free = list(range(1, blocks))
    rng.shuffle(free)
    sequences = [PagedSequence(600) for _ in range(4)]
    for _ in range(25):
        batch = [s for s in sequences if rng.random() < 0.8 and s.computed < 500]
        if not batch:
            continue
        counts = [rng.choice([1, 1, 1, 7, 40, 96]) for _ in batch]
        for sequence, new in zip(batch, counts, strict=True):
            sequence.grow(new, policy, free)
        outputs = run(batch, counts, policy, recent, archive, codec)
        for sequence, new, output in zip(batch, counts, outputs, strict=True):
            torch.testing.assert_close(
                output.double(), sequence.expected(new), rtol=1e-3, atol=1e-4
            )
            sequence.computed += new
