"""Reports of the scheduler add up, whoever receives them and whatever is preempted."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY

from vllm_kvpca.metrics import METRICS
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.block_sizes import BlockSizes
from vllm_kvpca.pages.layout import raw_token_bytes
from vllm_kvpca.serving.observe import stats as cache_stats
from vllm_kvpca.serving.observe.stat_logger import KvpcaStatLogger
from vllm_kvpca.serving.observe.stats import engine_status, take_stats
from vllm_kvpca.serving.observe.times import ArchiveTimer, SampleFetcher, timer_of
from vllm_kvpca.serving.step.archive_layer import ArchiveLayer

from .shadow import HEAD_SIZE, Engine, Mix, Sequence, make_specs, pool_for, random_traffic

LONGEST = 776
ONE_PAIR = Mix((BlockSizes(32, 80),))
MIXES = {
    "one pair": ONE_PAIR,
    "two pairs": Mix((BlockSizes(32, 80), BlockSizes(32, 80))),
    "two head shapes and a window": Mix((BlockSizes(32, 80), BlockSizes(40, 104)), ((32, 100),)),
}


class Scheduler:
    """What cache_stats sees of vLLM's scheduler, over the shadow engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kv_cache_manager = engine.manager
        self.kv_cache_config = engine.manager.coordinator.kv_cache_config
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=LONGEST),
            cache_config=SimpleNamespace(num_gpu_blocks=None),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
            max_in_flight_tokens=512,
        )

    @property
    def running(self) -> list:
        return [sequence.request for sequence in self.engine.running]

    @property
    def requests(self) -> dict:
        alive = [*self.engine.running, *self.engine.waiting]
        return {sequence.request.request_id: sequence.request for sequence in alive}


@dataclass
class Traffic:
    """A run, what was reported after every third step, and how it stood then: counted from the
    sequences that run and their block tables, as the shadow engine knows them."""

    engine: Engine
    scheduler: Scheduler
    name: str
    reports: list[dict] = field(default_factory=list)
    expected: list[dict] = field(default_factory=list)

    def report(self, running: list[Sequence]) -> None:
        self.reports.append(take_stats(self.scheduler))
        plans = self.engine.mix.pairs
        computed = sum(sequence.request.num_computed_tokens for sequence in running)
        # Tables of recent and archive blocks of each pair; one layer each.
        tables = [sequence.tables[: 2 * len(plans)] for sequence in running]
        blocks = [
            sum(len(own[2 * pair + 1]) for own in tables) * plan.archive_block
            for pair, plan in enumerate(plans)
        ]
        archived = sum(blocks) // len(plans)
        sequences = sum(any(own[1::2]) for own in tables)
        ids = {row for own in tables for table in own[1::2] for row in table}
        page = max(plan.page_bytes_per_head(raw_token_bytes(HEAD_SIZE)) for plan in plans)
        self.expected.append(
            {
                "kv_cache_tokens/archived": archived,
                "kv_cache_tokens/raw": computed - archived,
                "sequences/archived": sequences,
                "sequences/raw": len(running) - sequences,
                "kv_cache_bytes/archived": len(ids) * page,
            }
        )


@pytest.fixture(scope="module", params=MIXES)
def traffic(request) -> Iterator[Traffic]:
    """Random traffic with preemptions; nothing is reported but what has changed."""
    mix = MIXES[request.param]
    blocks = int(1.05 * pool_for(mix, (256, 128), LONGEST, 2))
    engine = Engine(mix, 256, 128, lag=1, blocks=blocks, reserve=False)
    traffic = Traffic(engine, Scheduler(engine), request.param)
    step, count = engine.step, 0

    def step_and_report() -> None:
        nonlocal count
        step()
        count += 1
        if count % 3 == 0:
            traffic.report(engine.running)

    engine.step = step_and_report
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_stats, "REPEAT_EVERY", math.inf)
        random_traffic(engine, random.Random(3), 170, 416)
        traffic.report([])  # all were aborted
        assert engine.counts["preemptions"] > 0 and engine.counts["finished"] > 3
        yield traffic


def test_gauges_are_true_after_every_report_and_only_changes_are_sent(traffic: Traffic):
    gauges = {metric.key for metric in METRICS if metric.kind == "gauge"}
    shown: dict[str, float] = {}
    for report, expected in zip(traffic.reports, traffic.expected, strict=True):
        changed = {k: v for k, v in report.items() if k.partition("/")[0] in gauges}
        assert not changed.items() & shown.items()
        shown |= changed
        assert {key: shown[key] for key in expected} == expected
    assert max(e["kv_cache_tokens/archived"] for e in traffic.expected) > 500
    assert max(e["sequences/archived"] for e in traffic.expected) > 1
    assert not any(traffic.expected[-1].values())


def test_all_gauges_are_sent_again_now_and_then(traffic: Traffic, monkeypatch):
    scheduler = Scheduler(traffic.engine)
    complete = take_stats(scheduler)
    assert take_stats(scheduler) == {}
    monkeypatch.setattr(cache_stats, "REPEAT_EVERY", 0.0)
    again = take_stats(scheduler)
    assert again == complete | dict.fromkeys(cache_stats.COUNTERS, 0)


def test_each_request_that_ended_is_observed_once_and_no_preempted_one(traffic: Traffic):
    engine, reports = traffic.engine, traffic.reports
    ended = [n for report in reports for n in report.get("request_archived_tokens", [])]
    assert len(ended) == engine.counts["finished"]
    assert any(ended)
    if engine.mix == ONE_PAIR:
        assert all(tokens % 80 == 0 for tokens in ended)


def test_two_api_servers_that_share_the_reports_count_everything_once(traffic: Traffic):
    engine, scheduler, reports = traffic.engine, traffic.scheduler, traffic.reports
    model = f"two-servers-{traffic.name}"
    config = SimpleNamespace(
        model_config=SimpleNamespace(served_model_name=model), additional_config={}
    )
    servers = [KvpcaStatLogger(config, [0]) for _ in range(2)]
    for number, report in enumerate(reports):
        servers[number % 2].record(SimpleNamespace(kvpca=report), None)

    def value(name: str) -> float | None:
        return REGISTRY.get_sample_value(name, {"model_name": model, "engine": "0"})

    assert engine.worker.archived > 0
    archived = [manager.archived_tokens for manager in engine.archives]
    assert value("kvpca_archived_tokens_total") == sum(archived) // len(archived)
    assert value("kvpca_request_archived_tokens_count") == engine.counts["finished"]
    figures = engine_status(scheduler)["figures"]
    for name in ("archived_tokens", "archive_operations", "archive_written_bytes"):
        assert value(f"kvpca_{name}_total") == figures[name] > 0
    observed = value("kvpca_request_archived_tokens_sum")
    assert figures["request_archived_tokens/sum"] == observed


def test_archive_time_is_that_of_one_layer_times_the_layers():
    timer = ArchiveTimer(layers=30)
    idle, busy = (SimpleNamespace(busy=torch.tensor([n, 0])) for n in (0, 1))
    assert timer.start(idle) is None
    for _ in range(2):
        timer.stop(timer.start(busy) - 0.5)  # as if it had begun half a second ago
    first, second = timer.take()
    assert 15 <= first < 16 and 15 <= second < 16
    assert timer.take() == []


def archive_layer(context) -> ArchiveLayer:
    """A layer as attach_archive adds it to an engine's layers."""
    _, spec = make_specs(BlockSizes(32, 80), 256, 128)
    codec = LayerCodec(spec.plan.archive, None, torch.eye(8)[None], torch.bfloat16)
    layer = ArchiveLayer(lambda: spec, codec, (1, 1, 8), timer_of(context))
    context[f"layer.{len(context)}"] = layer
    return layer


def test_each_engine_times_one_of_its_own_layers():
    """A second engine in a process must not count the first one's layers."""
    for _ in range(2):
        context = {}
        layers = [archive_layer(context) for _ in range(3)]
        assert len({id(layer.timer) for layer in layers}) == 1
        assert layers[0].timer.layers == 3
        assert [layer.timed for layer in layers] == [True, False, False]


def test_bases_are_buffers_that_no_checkpoint_has():
    """What sleep level 2 keeps, and what a reload does not ask for."""
    layer = archive_layer({})
    held = dict(layer.named_buffers())
    assert held["v_basis"] is layer.codec.v_basis
    assert not layer.state_dict()
    layer.settle(layer.get_kv_cache_spec(None).plan.scaled(2))
    assert layer.codec.layout.block_size == 160
    assert layer.codec.v_basis is held["v_basis"]


def test_samples_are_fetched_without_waiting():
    """The engine asks once, goes on without an answer, and takes it when it is there."""

    class Answer:
        ready = False

        def done(self) -> bool:
            return self.ready

        def result(self) -> list[list[float]]:
            assert self.ready, "the engine would wait here"
            return [[0.25], [0.5]]  # one list per rank

    answers: list[Answer] = []

    def ask(method, *, non_block: bool) -> Answer:
        assert non_block
        answers.append(Answer())
        return answers[-1]

    fetcher = SampleFetcher(SimpleNamespace(collective_rpc=ask))
    assert [fetcher.take() for _ in range(3)] == [[], [], []]
    assert len(answers) == 1
    answers[0].ready = True
    assert fetcher.take() == [0.25]
