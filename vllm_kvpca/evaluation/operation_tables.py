"""Rows of the tables about running a server: soak, process layouts."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.evaluation.record import Record

SOAK_HEADS = [
    "process",
    "memory in the second quarter, MiB",
    "in the last quarter",
    "slope over the second half, MiB/min",
]
LAYOUT_HEADS = [
    "layout",
    "engines",
    "requests counted",
    "archived tokens counted",
    "readings meanwhile",
    "of them torn, read again",
]


def soak(record: Record) -> list[list[str]]:
    results: Any = record.results
    rows = [
        [
            process["process"],
            f"{process['second_quarter_mib']:,.0f}",
            f"{process['last_quarter_mib']:,.0f}",
            f"{process['slope_mib_per_minute']:+.2f}",
        ]
        for process in results["memory"]
    ]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(results["requests"].items()))
    summary = (
        f"{results['minutes']:.0f} minutes, {record.settings['clients']} clients; {kinds}; "
        f"{results['errors']} errors, {results['preemptions']:,.0f} preemptions, "
        f"{results['archived_tokens']:,.0f} tokens archived; "
        f"{results['scrapes']:,} readings of the metrics, {results['read_again']} of them torn"
    )
    return [*rows, [summary, "", "", ""]]


def layouts(record: Record) -> list[list[str]]:
    results: Any = record.results
    return [
        [
            f"`{name}`" if name.startswith("--") else name,
            f"{one['engines']}",
            f"{one['requests']}",
            f"{one['archived_tokens']:,}",
            f"{one['readings']:,}",
            f"{one['read_again']}",
        ]
        for name, one in results["layouts"].items()
    ]
