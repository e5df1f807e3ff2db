"""How K and V are spread over directions: records of `vllm-kvpca calibrate --records`."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table


def _rows(record: Record) -> list[list[str]]:
    """A line for each of K and V: mean over layers, and the range."""
    results: Any = record.results
    lines = []
    for which in ("k", "v"):
        rows = [row for row in results["layers"] if row["tensor"] == which]
        cells = []
        for key in ("channel_gain_db", "coding_gain_db"):
            values = [row[key] for row in rows]
            low, high = min(values), max(values)
            cells.append(f"{sum(values) / len(values):.1f} dB ({low:.1f} to {high:.1f})")
        shares = [row["mean_share"] for row in rows]
        cells.append(f"{sum(shares) / len(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")
        lines.append([which.upper(), *cells])
    return lines


TABLES = {
    "calibration": Table(
        [
            "mean over layers (range)",
            "coding gain of the channels",
            "coding gain of the PCA basis",
            "energy that is the same for every token",
        ],
        _rows,
        "vllm-kvpca calibrate",
    )
}
