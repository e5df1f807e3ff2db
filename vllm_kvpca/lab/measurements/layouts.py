"""Metrics in each layout of processes: records of tests/e2e/check_layouts.py."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table


def _rows(record: Record) -> list[list[str]]:
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


TABLES = {
    "layouts": Table(
        [
            "layout",
            "engines",
            "requests counted",
            "archived tokens counted",
            "readings meanwhile",
            "of them torn, read again",
        ],
        _rows,
        "make test-layouts",
    )
}
