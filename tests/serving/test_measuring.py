"""What measures cannot end an engine: an error is logged once, and everything else goes on."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from vllm_kvpca.serving import log
from vllm_kvpca.serving.adapters import cache_groups, figures
from vllm_kvpca.serving.observe import times
from vllm_kvpca.serving.observe.stat_logger import KvpcaStatLogger

COMPRESSES = SimpleNamespace(additional_config={"kv_compression": {"preset": "k8v4"}})


@pytest.fixture
def lines(monkeypatch):
    """The first line of each thing the plugin logs."""
    monkeypatch.setattr(log, "_told", set())
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    log.logger.addHandler(handler)
    yield found
    log.logger.removeHandler(handler)


def failed(error=None) -> Future:
    future: Future = Future()
    future.set_exception(error or RuntimeError("Worker failed with error"))
    return future


def answered(samples) -> Future:
    future: Future = Future()
    future.set_result([samples])
    return future


class Executor:
    """Gives one prepared answer per question; an exception is raised at once."""

    def __init__(self, *answers) -> None:
        self.answers = list(answers)

    def collective_rpc(self, method, non_block):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_workers_that_fail_to_answer_are_asked_again(monkeypatch, lines):
    monkeypatch.setattr(times, "ASK_EVERY", 0)
    executor = Executor(failed(), RuntimeError("Executor failed."), failed(), answered([0.5]), None)
    fetcher = times.SampleFetcher(executor)
    assert [fetcher.take() for _ in range(6)] == [[], [], [], [], [0.5], []]
    assert lines == ["KV compression: times of archiving failed; serving goes on without."]


def test_a_worker_answers_whatever_happens(monkeypatch, lines):
    """One that raised would leave the other workers' answers to be taken for later ones."""

    def fail():
        raise RuntimeError("no such event")

    monkeypatch.setattr(times.ArchiveTimer, "take", lambda self: fail())
    context = SimpleNamespace(static_forward_context={})
    worker = SimpleNamespace(vllm_config=SimpleNamespace(compilation_config=context))
    assert times.take_samples(worker) == []
    assert len(lines) == 1


def test_a_step_is_not_ended_by_its_clock(monkeypatch, lines):
    import torch

    def fail(*args):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fail)
    timer = times.ArchiveTimer(layers=2)
    busy = SimpleNamespace(device=torch.device("cuda"))
    started = timer.start(SimpleNamespace(busy=busy))
    timer.stop(started)
    assert timer.take() == []
    assert len(lines) == 1


@pytest.mark.parametrize("stats", [SimpleNamespace(num_running_reqs=3), None])
def test_vllm_s_statistics_go_on_without_ours(monkeypatch, lines, stats):
    def fail(scheduler):
        raise KeyError("gone")

    monkeypatch.setattr("vllm_kvpca.serving.observe.stats.take_stats", fail)
    make_stats = figures._make_stats(lambda self: stats)
    for _ in range(2):
        assert make_stats(SimpleNamespace(vllm_config=COMPRESSES)) is stats
    assert len(lines) == 1


@pytest.mark.parametrize(
    "wrap", [figures._run_busy_loop, figures._init_engine, figures._init_stat_loggers]
)
def test_an_engine_starts_without_our_figures(lines, wrap):
    """`self` lacks all that the wrappers use."""
    calls = []
    engine = SimpleNamespace(vllm_config=COMPRESSES)
    wrap(lambda *args: calls.append(args))(engine, COMPRESSES)
    assert calls == [(engine, COMPRESSES)]
    assert len(lines) == 1


class Hostile:
    """A configuration of another plugin: `additional_config` need not be a dictionary."""

    @property
    def additional_config(self):
        return object()


@pytest.mark.parametrize("config", [Hostile(), None, SimpleNamespace(additional_config=None)])
@pytest.mark.parametrize(
    "wrap",
    [
        figures._make_stats,
        figures._run_busy_loop,
        figures._init_engine,
        figures._init_stat_loggers,
    ],
)
def test_servers_that_do_not_compress_are_passed_through(lines, wrap, config):
    engine = SimpleNamespace(vllm_config=config)
    calls = []
    wrap(lambda *args: calls.append(args))(engine, config)
    assert calls == [(engine, config)]
    assert lines == []


@pytest.mark.parametrize("arguments", [{}, {"kv_cache_config": None, "enable_caching": True}])
def test_a_cache_that_is_passed_in_another_way_gets_vllm_s_coordinator(lines, arguments):
    """Every server makes one, compressed or not."""
    coordinator = object()
    make = cache_groups._get_kv_cache_coordinator(lambda *args, **kwargs: coordinator)
    assert make(**arguments) is coordinator


def test_a_metric_that_cannot_be_published_does_not_hide_the_others(monkeypatch, lines):
    published = {}

    def child(self, path, engine):
        if path == "broken":
            raise ValueError("Duplicated timeseries")
        return SimpleNamespace(set=lambda value: published.update({path: value}))

    monkeypatch.setattr(KvpcaStatLogger, "_child", child)
    monkeypatch.setattr("vllm_kvpca.serving.observe.stat_logger._publisher", lambda c: c.set)
    model = SimpleNamespace(served_model_name="m")
    config = SimpleNamespace(model_config=model, additional_config=None)
    logger = KvpcaStatLogger(config, [0])
    stats = SimpleNamespace(kvpca={"broken": 1, "sequences/raw": 2})
    logger.record(stats, None)
    logger.record(stats, None)
    assert published == {"sequences/raw": 2}
    assert len(lines) == 1
