"""`vllm-kvpca metrics-docs`: the page of metrics, from the table that creates them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.metrics import COMMON_LABELS, METRICS, Metric, shown_name

PAGE = Path("docs/metrics.md")

_HEAD = f"""# Metrics

`vllm serve` with `--kv-compression-preset` adds these to its `/metrics`. All carry vLLM's labels
{" and ".join(f"`{label}`" for label in COMMON_LABELS)}. They come from the scheduler when
the engine starts and with every step, together with vLLM's own `vllm:kv_cache_usage_perc`.

This page is made from the table in `vllm_kvpca/metrics.py`: `vllm-kvpca metrics-docs`.

| metric | type | unit | labels | meaning |
| --- | --- | --- | --- | --- |
"""

_TAIL = """
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


def metrics_docs(
    output: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail if the page is stale.")
    ] = False,
) -> None:
    """Write the page that documents the metrics."""
    fresh = output.exists() and output.read_text() == page()
    if check and not fresh:
        raise OptionsError(f"{output} is stale: run vllm-kvpca metrics-docs.")
    if not fresh:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page())
        print(output)
