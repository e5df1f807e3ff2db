"""Steps of random sequences, planned and run, against dense attention over raw tokens.

With the format `raw` the archive holds the same numbers as the recent pages, so whatever
split of a sequence into parts must give what attention over the whole sequence gives.
"""

from __future__ import annotations

import random

import pytest
import torch
from paged import (
    ARCHIVE_BLOCK,
    HEAD_DIM,
    KV_HEADS,
    RAW_BLOCK,
    SCALE,
    PagedSequence,
    step_tokens,
    table,
)

from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.preset import FORMATS, Preset
from vllm_kvpca.serving.step.batch import StepInput, plan_step
from vllm_kvpca.serving.step.run import StepTokens, run_step


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
    query, key, value = step_tokens(sequences, counts)
    output = torch.full(query.shape, float("nan"))
    tokens = StepTokens(query, key, value, output)
    run_step(step, tokens, recent_pages, archive_pages, codec, SCALE)
    return output.split(counts)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("thresholds", [(96, 48), (0, 0), (64, 64)])
def test_random_steps_equal_dense_attention(seed, thresholds):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    policy = Policy(*thresholds, align=ARCHIVE_BLOCK)
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
