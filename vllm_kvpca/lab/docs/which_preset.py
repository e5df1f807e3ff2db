"""The README's table of presets to choose from: ratio, loss and speed, each from a record."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.lab.measurements.codec_study import all_rows, row_of
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import RATIOS_HEAD, Table, change, ratios

FOR = {
    "k8v4": "any model",
    "kh8v4": "any model, above all if its K has a bias (Qwen2, Qwen2.5)",
    "k5.5v5.5": "calibrated on the model: least loss",
    "k5.5v4": "calibrated on the model: between",
    "k4v4": "calibrated on the model: most tokens",
}
"""The formats to choose from, in the order of their total ratios, and what each is for."""
SHAPE = "16x16384"
"""Sequences x tokens of the decode kernel's times."""
_LINES = "which-preset"


def _choose(studies: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """The records that the numbers are from; the first one holds all lines."""
    kernels = max((r for r in records if _speeds(r)), key=lambda r: r.date, default=None)
    found = {name: row_of(name, all_rows(studies)) for name in FOR}
    found = {name: row for name, row in found.items() if row is not None}
    if not found or kernels is None:
        return []
    used = [s for s in studies if any(row in all_rows([s]) for row in found.values())]
    lines = [_line(name, row, _speeds(kernels).get(name)) for name, row in found.items()]
    first, *others = [*used, kernels]
    return [
        first.model_copy(update={"results": {_LINES: lines}}),
        *(one.model_copy(update={"results": {_LINES: []}}) for one in others),
    ]


def _speeds(record: Record) -> dict[str, float]:
    """Speed of each decode kernel against FlashAttention-3 in bf16; of other records nothing."""
    results: Any = record.results
    if record.kind != "kernels":
        return {}
    return {
        row["contender"]: row["against_fa3_bf16"]
        for row in results["rows"]
        if row["shape"] == SHAPE and row["against_fa3_bf16"] is not None
    }


def _line(name: str, row: Any, speed: float | None) -> list[str]:
    preset = f"`{name}`, {FOR[name]}"
    return [preset, ratios(row), change(row), "-" if speed is None else f"{speed:.2f}x"]


def _rows(record: Record) -> list[list[str]]:
    results: Any = record.results
    return list(results[_LINES])


TABLES = {
    "which-preset": Table(
        ["preset", RATIOS_HEAD, "perplexity change (95 % interval)", "decode attention"],
        _rows,
        "python benchmarks/codec_study.py and vllm-kvpca bench kernels",
        kind="codec-study",
        choose=_choose,
    )
}
