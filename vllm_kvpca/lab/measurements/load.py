"""A server under load: records of benchmarks/serve_load.py and benchmarks/guidellm_load.py."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.lab.engine import STOCK
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table


def _rows(record: Record) -> list[list[str]]:
    results: Any = record.results
    rows = []
    for server, one in results.items():
        name = "stock" if server == STOCK else f"`{record.settings['preset']}`"
        latency = [f"{one[key]:,.0f}" for key in ("ttft_ms", "ttft_p99_ms", "itl_ms", "itl_p99_ms")]
        speed = f"{one['output_tokens_per_second']:,.1f}"
        rows.append([name, f"{one['completed']}", f"{one['failed']}", speed, *latency])
    return rows


_HEADS = [
    "server",
    "requests answered",
    "failed",
    "output tokens/s",
    "first token, median ms",
    "p99",
    "between tokens, median ms",
    "p99",
]
TABLES = {
    "load": Table(_HEADS, _rows, "python benchmarks/serve_load.py"),
    "guidellm": Table(_HEADS, _rows, "python benchmarks/guidellm_load.py"),
}
