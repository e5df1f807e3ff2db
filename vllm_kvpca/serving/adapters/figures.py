"""Figures from the scheduler to the API server: statistics, archive times, status, stat logger.

All of it measures. An error in it is logged once and must not end an engine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from vllm_kvpca.serving.adapters.changes import Add, Misfit, Patch, Step, Wrap, owner_of
from vllm_kvpca.serving.log import contained
from vllm_kvpca.serving.settings.options import asks_for_compression

_FIELD = "kvpca"


@dataclasses.dataclass(frozen=True)
class StatsField:
    """An optional field of SchedulerStats: vLLM's serializer then carries it along."""

    target: str = f"vllm.v1.metrics.stats:SchedulerStats.{_FIELD}"

    def is_made(self) -> bool:
        try:
            owner, name = owner_of(self.target)
        except Misfit:
            return False
        return name in getattr(owner, "__dataclass_fields__", {})

    def prepare(self) -> Step:
        owner, name = owner_of(self.target)
        if not dataclasses.is_dataclass(owner):
            raise Misfit("vLLM's SchedulerStats is no dataclass")
        fields = owner.__dataclass_fields__
        field: Any = dataclasses.field(default=None)
        field.name, field.type, field.kw_only = name, "dict[str, Any] | None", False
        field._field_type = dataclasses._FIELD  # type: ignore[attr-defined]

        def make() -> None:
            setattr(owner, name, None)
            owner.__annotations__[name] = dict[str, Any] | None
            fields[name] = field

        def undo() -> None:
            delattr(owner, name)
            del owner.__annotations__[name], fields[name]

        return Step(make, undo)


def _compresses(owner: Any) -> bool:
    return asks_for_compression(getattr(owner, "vllm_config", None))


def _make_stats(original: Any) -> Any:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = original(self, *args, **kwargs)
        if _compresses(self):
            with contained("figures of the KV cache"):
                from vllm_kvpca.serving.observe.stats import take_stats

                figures = take_stats(self)  # also without statistics: it empties its lists
                if stats is not None:
                    stats.kvpca = figures
        return stats

    return wrapper


STATISTICS = Patch(
    title="statistics",
    why="vLLM's scheduler statistics have no place for a plugin's figures.",
    how="`SchedulerStats` gets an optional field `kvpca`, which vLLM's serializer carries along; "
    "`make_stats` of an engine that compresses fills it.",
    waits_for="statistics that carry a plugin's data",
    fails="Logged once; the engine and vLLM's own metrics go on without our figures.",
    changes=(
        StatsField(),
        Wrap("vllm.v1.core.sched.scheduler:Scheduler.make_stats", _make_stats, ("self",)),
    ),
)


def _run_busy_loop(original: Any) -> Any:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _compresses(self):
            with contained("first figures of the KV cache"):
                from vllm.v1.engine import EngineCoreOutputs

                _fetch_archive_times(self)
                stats = self.scheduler.make_stats()
                if stats is not None:
                    self.output_queue.put_nowait((0, EngineCoreOutputs(scheduler_stats=stats)))
        return original(self, *args, **kwargs)

    return wrapper


FIRST_STATISTICS = Patch(
    title="first statistics",
    why="vLLM sends statistics only with the first step; until then dashboards would lack "
    "every series.",
    how="`run_busy_loop` sends them once before the loop begins.",
    waits_for="vLLM to send statistics before the first step",
    fails="Logged once; series then begin with the first request.",
    changes=(
        Wrap("vllm.v1.engine.core:EngineCoreProc.run_busy_loop", _run_busy_loop, ("self",)),
        Wrap("vllm.v1.engine.core:DPEngineCoreProc.run_busy_loop", _run_busy_loop, ("self",)),
    ),
)


def _init_engine(original: Any) -> Any:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if _compresses(self):
            with contained("times of archiving"):
                _fetch_archive_times(self)

    return wrapper


def _fetch_archive_times(engine: Any) -> None:
    from vllm_kvpca.serving.observe.stats import Sent
    from vllm_kvpca.serving.observe.times import SampleFetcher

    if engine.log_stats:
        Sent.of(engine.scheduler).samples = SampleFetcher(engine.model_executor)


ARCHIVE_TIMES = Patch(
    title="archive times",
    why="A scheduler cannot ask the workers anything.",
    how="`EngineCore.__init__` gives the scheduler what asks the workers, every few seconds and "
    "without waiting, how long archiving took. That serves engines within the process; one in a "
    "process of its own loads plugins only while it is initialized, and `run_busy_loop` does it.",
    waits_for="a place where a scheduler may ask its workers",
    fails="Logged once; the histogram of archive times then stays as it is.",
    changes=(Wrap("vllm.v1.engine.core:EngineCore.__init__", _init_engine, ("self",)),),
)


def _kvpca_status(self: Any) -> Any:
    from vllm_kvpca.serving.observe.stats import engine_status

    return engine_status(self.scheduler)


STATUS = Patch(
    title="status",
    why="A route can ask the workers, but not the scheduler.",
    how="`EngineCore` gets a method `kvpca_status`, which `GET /kv_compression` and "
    "`vllm_kvpca.kv_metrics` call as vLLM calls its own.",
    waits_for="utility methods of plugins in the engine",
    fails="The route answers with an error; the engine goes on.",
    changes=(Add("vllm.v1.engine.core:EngineCore.kvpca_status", _kvpca_status),),
)


def _init_stat_loggers(original: Any) -> Any:
    def wrapper(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        original(self, vllm_config, *args, **kwargs)
        if asks_for_compression(vllm_config):
            with contained("metrics of the KV cache"):
                from vllm_kvpca.serving.observe.stat_logger import KvpcaStatLogger

                self.stat_loggers.append(KvpcaStatLogger(vllm_config, self.engine_indexes))

    return wrapper


STAT_LOGGER = Patch(
    title="stat logger",
    why="vLLM has an entry point for stat loggers, but a logger found there overrules "
    "--disable-log-stats in every engine, compressed or not.",
    how="`StatLoggerManager.__init__` appends our logger in engines that compress.",
    waits_for="stat-logger plugins that do not switch statistics on",
    fails="Logged once; vLLM's own metrics go on without ours.",
    changes=(
        Wrap(
            "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
            _init_stat_loggers,
            ("self", "vllm_config"),
        ),
    ),
)

PATCHES = (STATISTICS, FIRST_STATISTICS, ARCHIVE_TIMES, STATUS, STAT_LOGGER)
