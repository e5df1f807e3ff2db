"""The starts kernel against the planner's definition (serving.batch)."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_cases import busy_list, step_tensors

from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.serving.step.batch import starts as planned

kernel = pytest.importorskip("vllm_kvpca.ops.starts.kernel", exc_type=ImportError)

RAW_BLOCK = 32
POLICY = Policy(300, 40, 80)


def table_of(sequences, width, device):
    """Each row null up to the given number of rows, then random ids; ids past the end as well."""
    table = torch.randint(1, 1000, (len(sequences), width + 3), dtype=torch.int32, device=device)
    for row, nulls in zip(table, [nulls for _, _, nulls in sequences], strict=True):
        row[:nulls] = 0
    return table[:, :-2]  # rows that are not contiguous with each other


def check(sequences, policy, device):
    """Sequences are (computed, new, leading null rows); returns the kernel's starts."""
    query_start, lengths, _ = step_tensors(sequences, device)
    width = max(1, -(-int(lengths.max()) // RAW_BLOCK), *(nulls for _, _, nulls in sequences))
    table = table_of(sequences, width, device)
    out = torch.full((len(sequences) + 1,), -7, dtype=torch.int32, device=device)
    kernel.starts(query_start, lengths, table, RAW_BLOCK, policy, out[:-1])
    computed = (lengths - query_start.diff()).clamp_min(0)
    assert out[:-1].tolist() == planned(table, computed, RAW_BLOCK, policy).tolist()
    assert out[-1] == -7
    return out[:-1].tolist()


@pytest.mark.parametrize(
    "computed, new, nulls, start",
    [
        (0, 0, 0, 0),  # a padding row
        (0, 0, 5, 0),  # one with a null table
        (0, 7, 0, 0),  # a new prompt
        (300, 1, 0, 0),  # at the threshold
        (301, 1, 7, 240),  # over it: null rows up to the one that the boundary falls into
        (301, 1, 0, 240),  # not given back yet
        (100, 9, 2, 80),  # a prefix hit in a sequence that is still short
        (320, 9, 10, 320),  # a prefix hit beyond the boundary, up to a block border
        (340, 9, 10, 320),
        (160, 500, 5, 160),  # everything computed is archived
        (160, 500, 8, 160),  # null rows of new tokens do not count
        (290, 1, 7, 240),  # a prefix hit whose archived part ends inside a raw block
    ],
)
def test_where_a_sequence_starts(computed, new, nulls, start, device):
    assert check([(computed, new, nulls)], POLICY, device) == [start]


@pytest.mark.parametrize("nulls", [63, 64, 65, 127, 128, 129, 200])
def test_more_null_rows_than_are_looked_at_together(nulls, device):
    """A threshold that is never reached: the search begins at row 0."""
    never = Policy(10**6, 0, 96)
    archived = -(-nulls * RAW_BLOCK // 96) * 96
    computed = 199 * RAW_BLOCK + 5
    assert check([(computed, 1, nulls)], never, device) == [min(computed, archived)]


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


@pytest.mark.parametrize("count", [1, 12, 255, 256, 257, 600])
def test_sequences_that_archive_are_listed(count, device):
    """Some archived more than the boundary, and some rows are padding; what lies behind stays."""
    torch.manual_seed(count)
    lengths = torch.randint(0, 1000, (count,), dtype=torch.int32, device=device)
    starts = torch.randint(0, 900, (count,), dtype=torch.int32, device=device)
    lengths[::7] = 0
    wanted = busy_list(starts, lengths, POLICY)
    out = torch.full((count + 2,), -7, dtype=torch.int32, device=device)
    kernel.list_busy(starts, lengths, POLICY, out)
    assert out[: len(wanted)].tolist() == wanted.tolist()
    assert (out[len(wanted) :] == -7).all()
