"""A server under mixed traffic for a long time: records of benchmarks/soak.py."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.lab.engine import STOCK
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table


def _rows(record: Record) -> list[list[str]]:
    results: Any = record.results
    settings: Any = record.settings
    requests = results["requests"]
    preloaded = settings.get("preloaded") or "glibc"
    return [
        [
            "stock" if settings["preset"] == STOCK else f"`{settings['preset']}`",
            preloaded.removeprefix("lib").partition(".")[0],
            f"{results['minutes']:.0f}",
            f"{requests['streamed'] + requests['whole']:,}",
            f"{requests['disconnected'] + requests['cancelled']:,}",
            f"{results['errors']}",
            f"{results['preemptions']:.0f}",
            f"{results['scrapes']:,} ({results['read_again']})" if results["scrapes"] else "none",
            *(_memory(results["memory"], role) for role in ("API server", "EngineCore", "Worker")),
        ]
    ]


def _memory(processes: list[dict[str, Any]], role: str) -> str:
    """Medians of the second and the last quarter, and the slope of the second half."""
    (one,) = (process for process in processes if process["process"] == role)
    quarters = f"{one['second_quarter_mib']:,.0f}, then {one['last_quarter_mib']:,.0f}"
    return f"{quarters} ({one['slope_mib_per_minute']:+.2f} per minute)"


TABLES = {
    "soak": Table(
        [
            "server",
            "allocator",
            "minutes",
            "answered",
            "dropped or cancelled",
            "errors",
            "preemptions",
            "readings of the metrics (torn)",
            "API server, MiB",
            "engine core, MiB",
            "worker, MiB",
        ],
        _rows,
        "python benchmarks/soak.py",
    )
}
