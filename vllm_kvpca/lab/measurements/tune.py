"""Formats that `vllm-kvpca tune` measured on a model; calibration.tune measures them."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import RATIOS_HEAD, Table, change, ratios


def _rows(record: Record) -> list[list[str]]:
    """A line for each format that was measured, lowest ratio first."""
    results: Any = record.results
    formats = sorted(results["formats"].items(), key=lambda item: item[1]["total_ratio"])
    return [
        [f"`{name}`", ratios(one), change(one), "chosen" if name == results["chosen"] else ""]
        for name, one in formats
    ]


TABLES = {
    "tune": Table(
        ["format", RATIOS_HEAD, "perplexity change, every token stored (95 % interval)", ""],
        _rows,
        "vllm-kvpca tune",
    )
}
