"""Prometheus metrics from the figures that arrive with vLLM's scheduler statistics."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_kvpca.metrics import COMMON_LABELS, METRICS
from vllm_kvpca.serving.log import contained
from vllm_kvpca.serving.settings.options import CompressionOptions, cached_preset

WHAT = "metrics of the KV cache"


@cache
def _collectors() -> dict[str, Gauge | Counter | Histogram]:
    """One Prometheus collector per metric and process.

    Not named `vllm:*`: vLLM unregisters those when an engine starts.
    """
    collectors: dict[str, Gauge | Counter | Histogram] = {}
    for metric in METRICS:
        labels = [*COMMON_LABELS, *metric.labels]
        if metric.kind == "counter":
            collectors[metric.key] = Counter(metric.name, metric.help, labels)
        elif metric.kind == "histogram":
            collectors[metric.key] = Histogram(
                metric.name, metric.help, labels, buckets=metric.buckets
            )
        else:
            collectors[metric.key] = Gauge(
                metric.name, metric.help, labels, multiprocess_mode="mostrecent"
            )
    return collectors


def _publisher(child: Any) -> Callable[[Any], None]:
    """What takes a figure of one series; counters come as what was added since the last figures.

    With several API servers each gets only some of the reports, and Prometheus' client adds up
    what they all counted.
    """
    if isinstance(child, Gauge):
        return child.set
    if isinstance(child, Counter):
        return child.inc

    def observe_all(values: list[float]) -> None:
        for value in values:
            child.observe(value)

    return observe_all


class KvpcaStatLogger(AggregateStatLoggerBase):
    """Publishes the figures of all engines of one API server.

    vLLM takes an error of a stat logger for the end of the engine, so none leaves this one.
    """

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        served = vllm_config.model_config.served_model_name
        self.model_name = served if isinstance(served, str) else served[0]
        self.engine_indexes = engine_indexes
        self.options = CompressionOptions.of(vllm_config)
        self._publish: dict[tuple[str, int], Callable[[Any], None]] = {}
        """By path and engine: looking a series up by its labels costs more than setting it."""

    def log_engine_initialized(self) -> None:
        if self.options is None:
            return
        with contained(WHAT):
            self._show_before_first_event()
            preset = cached_preset(self.options.preset)
            for engine in self.engine_indexes:
                info = _collectors()["preset_info"]
                assert isinstance(info, Gauge)
                info.labels(self.model_name, str(engine), preset.name, preset.config.format).set(1)

    def record(
        self,
        scheduler_stats: Any,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        figures = getattr(scheduler_stats, "kvpca", None)
        if not figures:
            return
        for path, value in figures.items():
            with contained(WHAT):
                self._publish_one(path, value, engine_idx)

    def _publish_one(self, path: str, value: Any, engine: int) -> None:
        publish = self._publish.get((path, engine))
        if publish is None:
            publish = _publisher(self._child(path, engine))
            self._publish[path, engine] = publish
        publish(value)

    def _child(self, path: str, engine: int) -> Any:
        key, _, state = path.partition("/")
        labels = (self.model_name, str(engine), *([state] if state else []))
        return _collectors()[key].labels(*labels)

    def _show_before_first_event(self) -> None:
        """Counters and histograms at 0: a rate is lost where a series begins above it."""
        for metric in METRICS:
            if metric.kind != "gauge":
                for engine in self.engine_indexes:
                    _collectors()[metric.key].labels(self.model_name, str(engine))
