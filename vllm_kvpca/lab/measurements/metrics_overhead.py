"""What counting and publishing the metrics costs: records of benchmarks/metrics_overhead.py."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table, one_row


def _row(record: Record) -> list[str]:
    results: Any = record.results
    return [
        f"{record.settings['sequences']}",
        f"{results['counting_us']:.0f}",
        f"{results['publishing_us']:.0f}",
        f"{results['step_ms']:.0f}",
        f"{results['share_of_step']:.3%}",
        f"{results['step_ms_at_half_a_percent']:.1f}",
    ]


TABLES = {
    "metrics-overhead": Table(
        [
            "sequences that decode",
            "counting in the scheduler, us",
            "publishing, us",
            "decode step here, ms",
            "share of the step",
            "shortest step of which this is 0.5 %, ms",
        ],
        one_row(_row),
        "python benchmarks/metrics_overhead.py",
    )
}
