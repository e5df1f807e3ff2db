"""The starts kernel against the planner's definition (serving.batch)."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_cases import step_tensors

from vllm_kvpca.codec.policy import Policy
from vllm_kvpca.serving.batch import _leading_nulls

kernel = pytest.importorskip("vllm_kvpca.kernels.starts", exc_type=ImportError)

RAW_BLOCK = 32
POLICY = Policy(300, 40, 96)


def table_of(sequences, width, device):
    """Each row null up to the given number of rows, then random ids; ids past the end as well."""
    table = torch.randint(1, 1000, (len(sequences), width + 3), dtype=torch.int32, device=device)
    for row, nulls in zip(table, [nulls for _, _, nulls in sequences], strict=True):
        row[:nulls] = 0
    return table[:, :-2]  # rows that are not contiguous with each other


def planned(query_start, lengths, table, policy):
    """What plan_step takes as start."""
    computed = (lengths - query_start.diff()).clamp_min(0)
    nulls = _leading_nulls(table, computed, RAW_BLOCK) * RAW_BLOCK
    return torch.minimum(computed, torch.maximum(policy.boundaries(computed), nulls)).int()


def check(sequences, policy, device):
    """Sequences are (computed, new, leading null rows); returns the kernel's starts."""
    query_start, lengths, _ = step_tensors(sequences, device)
    width = max(1, -(-int(lengths.max()) // RAW_BLOCK), *(nulls for _, _, nulls in sequences))
    table = table_of(sequences, width, device)
    out = torch.full((len(sequences) + 1,), -7, dtype=torch.int32, device=device)
    kernel.starts(query_start, lengths, table, RAW_BLOCK, policy, out[:-1])
    assert out[:-1].tolist() == planned(query_start, lengths, table, policy).tolist()
    assert out[-1] == -7
    return out[:-1].tolist()


@pytest.mark.parametrize(
    "computed, new, nulls, start",
    [
        (0, 0, 0, 0),  # a padding row
        (0, 0, 5, 0),  # one with a null table
        (0, 7, 0, 0),  # a new prompt
        (300, 1, 0, 0),  # at the threshold
        (301, 1, 6, 192),  # over it: as many null rows as the boundary has
        (301, 1, 0, 192),  # not given back yet
        (100, 9, 3, 96),  # a prefix hit in a sequence that is still short
        (320, 9, 10, 320),  # a prefix hit beyond the boundary, up to a block border
        (330, 9, 11, 330),  # and beyond what is computed
        (96, 500, 3, 96),  # everything computed is archived; the rest of the row is new
        (96, 500, 8, 96),  # null rows of new tokens do not count
        (64, 1, 2, 64),  # computed on a block border, all of it null
        (64, 1, 1, 32),
    ],
)
def test_where_a_sequence_starts(computed, new, nulls, start, device):
    assert check([(computed, new, nulls)], POLICY, device) == [start]


@pytest.mark.parametrize("nulls", [63, 64, 65, 127, 128, 129, 200])
def test_more_null_rows_than_are_looked_at_together(nulls, device):
    """A threshold that is never reached: the search begins at row 0."""
    never = Policy(10**6, 0, 96)
    assert check([(199 * RAW_BLOCK + 5, 1, nulls)], never, device) == [
        min(199 * RAW_BLOCK + 5, nulls * RAW_BLOCK)
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("policy", [POLICY, Policy(0, 0, 32), Policy(2000, 500, 160)])
def test_random_batches_with_padding_rows(seed, policy, device):
    torch.manual_seed(seed)
    rng = random.Random(seed)
    sequences = [
        (rng.choice([0, 31, 32, 33, rng.randrange(3000)]), rng.choice([1, 1, 50]), 0)
        for _ in range(12)
    ]
    sequences = [
        (computed, new, rng.choice([0, policy.boundary(computed) // RAW_BLOCK, rng.randrange(100)]))
        for computed, new, _ in sequences
    ]
    check([*sequences, (0, 0, 0), (0, 0, 2)], policy, device)
