"""The page of metrics, from the table that creates them."""

from __future__ import annotations

from vllm_kvpca.metrics import COMMON_LABELS, METRICS, Metric, shown_name

_HEAD = f"""# Metrics

`vllm serve` with `--kv-compression-preset` adds these to its `/metrics`. All carry vLLM's labels
{" and ".join(f"`{label}`" for label in COMMON_LABELS)}. They come from the scheduler when
the engine starts and with every step, together with vLLM's own `vllm:kv_cache_usage_perc`.

This page is made from the table in `vllm_kvpca/metrics.py`: `vllm-kvpca metrics-docs`.

| metric | type | unit | labels | meaning |
| --- | --- | --- | --- | --- |
"""

_TAIL = """
## Within a Python program

`LLM.get_metrics()` lists vLLM's own metrics alone. `kv_metrics` gives these, by their names without
`kvpca_` and `_total`, whether the engine runs in the program's process or in its own:

    from vllm_kvpca import kv_metrics

    kv_metrics(llm)["kv_cache_bytes"]    # {"raw": ..., "archived": ..., "free": ...}

## Queries

Share of the cache in use, as in `vllm:kv_cache_usage_perc`:

    1 - sum by (model_name, engine) (kvpca_kv_cache_bytes{state="free"})
      / sum by (model_name, engine) (kvpca_kv_cache_bytes)

Share of requests that ended with nothing archived:

    sum(rate(kvpca_request_archived_tokens_bucket{le="0.0"}[5m]))
      / sum(rate(kvpca_request_archived_tokens_count[5m]))

Tokens archived per second:

    rate(kvpca_archived_tokens_total[5m])

How many times more tokens fit than without compression:

    kvpca_kv_cache_capacity_tokens / kvpca_kv_cache_capacity_raw_tokens
"""


def page() -> str:
    """The whole page."""
    return _HEAD + "".join(_row(metric) for metric in METRICS) + _TAIL


def _row(metric: Metric) -> str:
    labels = ", ".join(_label(metric, label) for label in metric.labels) or "-"
    cells = (f"`{shown_name(metric)}`", metric.kind, metric.unit, labels, metric.help)
    return f"| {' | '.join(cells)} |\n"


def _label(metric: Metric, label: str) -> str:
    values = metric.states if label == "state" else ()
    return f"`{label}`" + (f" ({', '.join(values)})" if values else "")
