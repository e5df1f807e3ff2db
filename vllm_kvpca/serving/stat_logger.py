"""Prometheus metrics from the figures that arrive with vLLM's scheduler statistics."""

from __future__ import annotations

from functools import cache
from typing import Any

from prometheus_client import Counter, Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_kvpca.metrics import COMMON_LABELS, METRICS
from vllm_kvpca.serving.options import CompressionOptions, cached_preset


@cache
def _collectors() -> dict[str, Gauge | Counter]:
    """One Prometheus collector per metric and process.

    Not named `vllm:*`: vLLM unregisters those when an engine starts.
    """
    collectors: dict[str, Gauge | Counter] = {}
    for metric in METRICS:
        labels = [*COMMON_LABELS, *metric.labels]
        if metric.kind == "counter":
            collectors[metric.key] = Counter(metric.name, metric.help, labels)
        else:
            collectors[metric.key] = Gauge(
                metric.name, metric.help, labels, multiprocess_mode="mostrecent"
            )
    return collectors


class KvpcaStatLogger(AggregateStatLoggerBase):
    """Publishes the figures of all engines of one API server."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        served = vllm_config.model_config.served_model_name
        self.model_name = served if isinstance(served, str) else served[0]
        self.engine_indexes = engine_indexes
        self.options = CompressionOptions.of(vllm_config)
        self._counted: dict[tuple[str, int], float] = {}

    def log_engine_initialized(self) -> None:
        if self.options is None:
            return
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
            key, _, state = path.partition("/")
            labels = (self.model_name, str(engine_idx), *([state] if state else []))
            collector = _collectors()[key]
            if isinstance(collector, Counter):
                before = self._counted.get((key, engine_idx), 0)
                # A smaller value means that the engine was restarted and counts anew.
                collector.labels(*labels).inc(value - before if value >= before else value)
                self._counted[key, engine_idx] = value
            else:
                collector.labels(*labels).set(value)
