"""Where archived parts end and which sequences archive: kernel and reference alike."""

from __future__ import annotations

import random

import pytest
import torch
from kernel_cases import busy_list, make_codec, make_plan, step_tensors

from vllm_kvpca.ops.locate import reference
from vllm_kvpca.pages.boundary import Policy

kernel = pytest.importorskip("vllm_kvpca.ops.locate.kernel", exc_type=ImportError)

RAW_BLOCK = 32
POLICY = Policy(300, 40, 80)


def table_of(sequences, width, device):
    """Each row null up to the given number of rows, then random ids; ids past the end as well."""
    table = torch.randint(1, 1000, (len(sequences), width + 3), dtype=torch.int32, device=device)
    for row, nulls in zip(table, [nulls for _, _, nulls in sequences], strict=True):
        row[:nulls] = 0
    return table[:, :-2]  # rows that are not contiguous with each other


def check(sequences, policy, device):
    """Sequences are (computed, new, leading null rows); returns their starts."""
    query_start, lengths, _ = step_tensors(sequences, device)
    width = max(1, -(-int(lengths.max()) // RAW_BLOCK), *(nulls for _, _, nulls in sequences))
    table = table_of(sequences, width, device)
    found = []
    for op in (reference, kernel):
        out = torch.full((len(sequences) + 1,), -7, dtype=torch.int32, device=device)
        busy = torch.full((len(sequences) + 2,), -7, dtype=torch.int32, device=device)
        op.locate(query_start, lengths, table, plan_of(policy, device), out[:-1], busy)
        assert out[-1] == -7
        listed = busy_list(out[:-1], lengths, policy)
        assert busy[: len(listed)].tolist() == listed.tolist()
        assert (busy[len(listed) :] == -7).all(), "what lies behind stays"
        found.append(out[:-1].tolist())
    assert found[0] == found[1]
    return found[1]


def plan_of(policy, device):
    return make_plan(make_codec("raw", 64, 1, torch.float16, device), RAW_BLOCK, policy)


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
    """Some archived more than the boundary, and some rows are padding."""
    rng = random.Random(count)
    sequences = [
        (0, 0, 0) if i % 7 == 0 else (rng.randrange(1000), 1, rng.randrange(28))
        for i in range(count)
    ]
    check(sequences, POLICY, device)
