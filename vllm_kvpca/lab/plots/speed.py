"""Decode attention on a GPU against FlashAttention-3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.lab.plots.themes import Theme, legend_below, pyplot, style, title
from vllm_kvpca.lab.record import Record

_SHOWN = ("k8v4", "fa3-fp8", "k8v8", "turboquant_k8v4", "k5.5v5.5", "k4v4")
"""In the order of the theme's colours."""


def draw_speed(records: Sequence[Record], theme: Theme) -> Any:
    """Groups of bars: speed of each kernel at each batch and length, FlashAttention-3 bf16 = 1."""
    (record,) = records
    rows: Any = record.results["rows"]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    speeds = {(row["contender"], row["shape"]): row["against_fa3_bf16"] for row in rows}
    names = [name for name in _SHOWN if (name, shapes[0]) in speeds]
    figure, axes = pyplot().subplots(figsize=(10, 4.2), layout="constrained")
    width = 0.85 / len(names)
    for index, name in enumerate(names):
        x = [i + (index - (len(names) - 1) / 2) * width for i in range(len(shapes))]
        y = [speeds[name, shape] for shape in shapes]
        axes.bar(x, y, width * 0.92, color=theme.cycle[index % 6], label=name)
    axes.axhline(1, color=theme.ink, lw=1.2, label="fa3-bf16")
    labels = [f"{batch} x {int(length):,}" for batch, length in (s.split("x") for s in shapes)]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set_xlabel("sequences x tokens")
    axes.set_ylabel("times as fast")
    place = record.hardware.gpu or record.hardware.cpu
    title(axes, f"Decode attention, {record.model}, {place}", theme)
    legend_below(figure, axes, theme)
    style(figure, axes, theme)
    return figure
