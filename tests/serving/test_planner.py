"""The plan of a step, from what vLLM says of it."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from vllm_kvpca.pages.block_sizes import BlockSizes
from vllm_kvpca.serving.step.plan import StepPlanner

from .shadow import make_specs

PLAN = BlockSizes(32, 80)


def planner(max_model_len: int = 4096, chunks: object = None) -> StepPlanner:
    recent, _ = make_specs(PLAN, 256, 128)
    return StepPlanner(recent.plan, 8, max_model_len, torch.device("cpu"), chunks)


def common(new: list[int], computed: list[int], table: torch.Tensor) -> SimpleNamespace:
    """What vLLM's runner hands to a builder."""
    query_start = torch.tensor([0, *new]).cumsum(0).int()
    lengths = (torch.tensor(new) + torch.tensor(computed)).int()
    return SimpleNamespace(
        num_reqs=len(new),
        num_actual_tokens=sum(new),
        max_query_len=max(new),
        query_start_loc=query_start,
        query_start_loc_cpu=query_start,
        seq_lens=lengths,
        seq_lens_cpu_upper_bound=lengths,
        block_table_tensor=table,
        slot_mapping=torch.arange(sum(new)),
    )


def random_table(computed: list[int], null_rows: list[int]) -> torch.Tensor:
    table = torch.zeros(len(computed), 64, dtype=torch.int32)
    for row, (length, nulls) in enumerate(zip(computed, null_rows, strict=True)):
        table[row, nulls : -(-(length + 600) // 32)] = 1 + row
    return table


def test_where_archived_parts_end():
    new = [1, 1, 1, 1, 40, 300, 7]
    computed = [10, 300, 1000, 200, 0, 500, 170]
    # The fourth and the last begin with a prefix hit in the archive.
    table = random_table(computed, [0, 0, 20, 5, 0, 10, 5])
    plan = planner().plan(common(new, computed, table))
    assert plan.starts.tolist() == [0, 160, 800, 160, 0, 320, 160]
    # 320 tokens of the third leave the window of 128 at 1,001; of the sixth at 800.
    assert plan.busy[: int(plan.busy[0]) + 1].tolist() == [1, 5]


def test_decodes_come_first_and_prefills_are_grouped_to_fit_the_workspace():
    new, computed = [1, 1, 40, 300, 700], [10, 300, 0, 500, 0]
    step = common(new, computed, random_table(computed, [0] * 5))
    plan = planner(max_model_len=1000, chunks=object()).plan(step)
    groups = plan.prefills
    assert plan.decodes == 2 and plan.max_new == 700
    assert [(g.sequences, g.rows, g.max_new, g.max_length, g.context) for g in groups] == [
        (slice(2, 4), slice(2, 342), 300, 800, True),
        (slice(4, 5), slice(342, 1042), 700, 700, False),
    ]
    assert groups[0].query_start.tolist() == [0, 40, 340]
    assert groups[0].key_start.tolist() == [0, 40, 840]
    assert groups[1].key_start.tolist() == groups[1].query_start.tolist() == [0, 700]


def test_padding_rows_of_a_graph_hold_nothing():
    table = random_table([300, 9, 0, 0], [0] * 4)
    plan = planner(chunks=object()).plan(common([1, 1, 0, 0], [300, 9, 0, 0], table))
    assert plan.decodes == 4 and plan.prefills == ()
    assert plan.starts.tolist() == [160, 0, 0, 0]
    assert plan.lengths.tolist() == [301, 10, 0, 0]
    assert plan.busy[0] == 0


def test_every_step_is_written_into_the_same_memory():
    """CUDA graphs read it at a fixed address."""
    chosen = planner()
    first, second = (chosen.plan(common([1], [n], random_table([n], [0]))) for n in (10, 1000))
    assert first.starts.data_ptr() == second.starts.data_ptr()
    assert first.busy.data_ptr() == second.busy.data_ptr()
