"""The plan of a step on a GPU, made by the metadata builder, against the host's plan."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_kvpca.pages.block_sizes import PagePlan
from vllm_kvpca.serving.step.backend import KvpcaMetadataBuilder
from vllm_kvpca.serving.step.batch import StepInput, plan_step

from .shadow import make_specs

pytest.importorskip("triton")
PLAN = PagePlan(32, 80)


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Kernels run interpreted here (see tests/conftest.py)."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


def builder(max_model_len: int = 4096) -> KvpcaMetadataBuilder:
    recent, _ = make_specs(PLAN, 256, 128)
    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=8),
        model_config=SimpleNamespace(max_model_len=max_model_len),
    )
    return KvpcaMetadataBuilder(recent, [], config, torch.device("cpu"))


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


def test_starts_are_those_of_the_host_plan():
    new = [1, 1, 1, 1, 40, 300, 7]
    computed = [10, 300, 1000, 200, 0, 500, 170]
    # The fourth and the last begin with a prefix hit in the archive.
    table = random_table(computed, [0, 0, 20, 5, 0, 10, 5])
    step = common(new, computed, table)
    plan = builder()._plan(step)
    wanted = plan_step(
        StepInput(
            query_start=step.query_start_loc,
            lengths=step.seq_lens,
            recent_table=table,
            archive_table=torch.ones(len(new), 64, dtype=torch.int32),
            recent_block=32,
            archive_block=80,
            policy=plan.policy,
        )
    )
    starts = torch.zeros(len(new), dtype=torch.int64)
    for bucket in wanted.buckets:
        rows = torch.searchsorted(step.query_start_loc, bucket.tokens[:, 0], right=True) - 1
        starts[rows] = bucket.archive_lengths
    assert plan.starts.tolist() == starts.tolist()
    assert starts.tolist() == [0, 160, 800, 160, 0, 320, 160]


def test_decodes_come_first_and_prefills_are_grouped_to_fit_the_workspace():
    new, computed = [1, 1, 40, 300, 700], [10, 300, 0, 500, 0]
    plan = builder(max_model_len=1000)._plan(common(new, computed, random_table(computed, [0] * 5)))
    groups = [prefill.group for prefill in plan.prefills]
    assert plan.decodes == 2 and plan.max_new == 700
    assert [(g.rows, g.tokens, g.max_new, g.max_length, g.context) for g in groups] == [
        (slice(2, 4), slice(2, 342), 300, 800, True),
        (slice(4, 5), slice(342, 1042), 700, 700, False),
    ]
    assert plan.prefills[0].query_start.tolist() == [0, 40, 340]
    assert plan.prefills[0].key_start.tolist() == [0, 40, 840]
    assert plan.prefills[1].key_start.tolist() == plan.prefills[1].query_start.tolist() == [0, 700]


def test_padding_rows_of_a_graph_hold_nothing():
    plan = builder()._plan(
        common([1, 1, 0, 0], [300, 9, 0, 0], random_table([300, 9, 0, 0], [0] * 4))
    )
    assert plan.decodes == 4 and plan.prefills == ()
    assert plan.starts.tolist() == [160, 0, 0, 0]
    assert plan.lengths.tolist() == [301, 10, 0, 0]


def test_every_step_writes_its_starts_into_the_same_memory():
    """CUDA graphs read them at a fixed address."""
    chosen = builder()
    first, second = (
        chosen._plan(common([1], [n], random_table([n], [0]))).starts for n in (10, 1000)
    )
    assert first.data_ptr() == second.data_ptr()
