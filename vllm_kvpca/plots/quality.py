"""Figures of quality: what compression costs, by format, by model and by model size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_kvpca.evaluation.record import Record
from vllm_kvpca.plots.themes import Theme, legend, legend_below, pyplot, style, title

_LINEAR = 0.1
"""Per cent: below this the axis of losses is linear, so that it can show zero and less."""

_OFF = 5.0
"""Per cent: points that lose more would squeeze all others together."""


class Point(NamedTuple):
    """One format on one model; losses in per cent. group: "preset", "peers" or "study"."""

    name: str
    ratio: float
    loss: float
    low: float
    high: float
    group: str
    perplexity: float


def points(records: Sequence[Record]) -> list[Point]:
    """All formats with every token archived: presets through the engine, options of a study."""
    found = []
    for record in records:
        settings: Any = record.settings
        if record.kind == "quality" and _hardest(record):
            found.append(_point(settings["preset"], "preset", settings, record.results))
        if record.kind == "codec-study":
            results: Any = record.results
            for row in results["rows"]:
                group = "peers" if row["group"] == "peers" else "study"
                about = {**row, "perplexity": results["perplexity_stock"]}
                about["perplexity"] *= 1 + row["perplexity_change"]
                found.append(_point(row["name"], group, row, about))
    return sorted(found, key=lambda point: (point.ratio, point.name))


def _hardest(record: Record) -> bool:
    """Every token archived, in the dtype that rounds least."""
    return record.settings["compress_after"] == 0 and record.results["dtype"] == "float16"


def _point(name: str, group: str, about: Any, results: Any) -> Point:
    loss, (low, high) = results["perplexity_change"], results["perplexity_change_ci95"]
    return Point(
        name,
        about["total_ratio"],
        100 * loss,
        100 * low,
        100 * high,
        group,
        results["perplexity"],
    )


def draw_frontier(records: Sequence[Record], theme: Theme) -> Any:
    """Loss over total ratio: presets, peers and all options of the study, of one model."""
    figure, axes = pyplot().subplots(figsize=(10, 5), layout="constrained")
    found = points(records)
    kinds = {
        "study": ("options of the codec study", theme.cycle[4], "o", 14, 1),
        "peers": ("peers, emulated on the same text", theme.cycle[1], "D", 34, 3),
        "preset": ("presets, through the served engine", theme.cycle[0], "o", 46, 4),
    }
    for group, (label, colour, marker, size, order) in kinds.items():
        chosen = [point for point in found if point.group == group]
        if not chosen:
            continue
        x, y = [p.ratio for p in chosen], [p.loss for p in chosen]
        bars = [[p.loss - p.low for p in chosen], [p.high - p.loss for p in chosen]]
        if group != "study":
            axes.errorbar(x, y, bars, fmt="none", ecolor=colour, elinewidth=1, zorder=order)
        axes.scatter(x, y, size, color=colour, marker=marker, label=label, zorder=order, lw=0)
    _name(axes, [p for p in found if p.group != "study"], theme)
    _loss_axis(axes, theme)
    axes.set_xlabel("raw bytes / stored bytes of K and V, scales included")
    axes.set_xlim(0.9, max(p.ratio for p in found) * 1.12)
    title(axes, f"{records[0].model}: compression against quality, every token archived", theme)
    legend_below(figure, axes, theme)
    style(figure, axes, theme)
    return figure


def _name(axes: Any, chosen: Sequence[Point], theme: Theme) -> None:
    for point in chosen:
        _label(axes, point, point.name, point.loss, _lower(point, chosen), theme)


def _lower(point: Point, others: Sequence[Point]) -> bool:
    """Whether a point close by lies above: then the name goes below."""
    near = [o for o in others if abs(o.ratio - point.ratio) < 0.3]
    return any(point.loss < o.loss < 3 * point.loss + 0.1 for o in near)


def _label(axes: Any, point: Point, text: str, y: float, below: bool, theme: Theme) -> None:
    axes.annotate(
        text,
        (point.ratio, y),
        xytext=(6, -5 if below else 5),
        textcoords="offset points",
        va="top" if below else "bottom",
        fontsize=8,
        color=theme.ink,
    )


def _loss_axis(axes: Any, theme: Theme) -> None:
    axes.set_yscale("symlog", linthresh=_LINEAR)
    ticks = [-0.1, 0, 0.1, 0.3, 1, 3, 10, 30, 100]
    low, high = axes.get_ylim()
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_yticks(shown, [f"{tick:+g} %" if tick else "0" for tick in shown])
    axes.minorticks_off()
    axes.axhline(0, color=theme.ink, lw=0.8)
    axes.set_ylabel("perplexity against stock")


def draw_models(records: Sequence[Record], theme: Theme) -> Any:
    """Perplexity itself over total ratio, a panel for each model."""
    models = by_model(records)
    figure, grid = pyplot().subplots(
        1, len(models), figsize=(6 * len(models), 4), layout="constrained", squeeze=False
    )
    for axes, (model, chosen) in zip(grid.flat, models.items(), strict=True):
        _one_model(axes, points(same_text(chosen)), theme)
        title(axes, f"{model}, every token archived", theme)
        style(figure, axes, theme)
    return figure


def same_text(records: Sequence[Record]) -> list[Record]:
    """The largest set of records that read the same tokens: perplexities of different texts do
    not compare."""
    by_text: dict[Any, list[Record]] = {}
    for record in records:
        if _hardest(record):
            names = tuple(text.sha256 for text in record.texts)
            by_text.setdefault((names, record.results["predicted_tokens"]), []).append(record)
    return max(by_text.values(), key=lambda chosen: (len(chosen), chosen[0].date))


def _one_model(axes: Any, found: Sequence[Point], theme: Theme) -> None:
    stock = found[0].perplexity / (1 + found[0].loss / 100)
    top = stock * (1 + 1.5 * max((p.loss for p in found if p.loss < _OFF), default=1) / 100)
    axes.axhline(stock, color=theme.ink, lw=1, ls="--")
    axes.text(1.02, stock, f"stock: {stock:.3f}", va="bottom", fontsize=8.5, color=theme.ink)
    for point in found:
        off = point.loss >= _OFF
        y = top - (top - stock) / 20 if off else point.perplexity
        axes.scatter(point.ratio, y, 46, color=theme.cycle[0], marker="^" if off else "o", zorder=3)
        text = f"{point.name}: {point.perplexity:.3f}"
        _label(axes, point, text, y, off or _lower(point, found), theme)
    axes.set_ylim(stock - (top - stock) / 8, top)
    axes.set_xlim(1, max(p.ratio for p in found) * 1.18)
    axes.set_xlabel("raw bytes / archived bytes of K and V, scales included")
    axes.set_ylabel("perplexity (triangle: above)")
    axes.ticklabel_format(axis="y", useOffset=False)


def draw_sizes(records: Sequence[Record], theme: Theme) -> Any:
    """Ratio and loss over the model's size, a line for each format that several models have."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes: set[float] = set()
    for (name, found), colour in zip(by_format(records).items(), theme.cycle, strict=False):
        x = [size for size, _ in found]
        sizes.update(x)
        left.plot(x, [p.ratio for _, p in found], "o-", color=colour, label=name)
        bars = [[p.loss - p.low for _, p in found], [p.high - p.loss for _, p in found]]
        y = [p.loss for _, p in found]
        right.errorbar(x, y, bars, fmt="o-", color=colour, label=name, elinewidth=1)
    title(left, "Raw / archived bytes of K and V", theme)
    title(right, "Perplexity against stock, every token archived", theme)
    _loss_axis(right, theme)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(sorted(sizes), [f"{size:,.0f}M" for size in sorted(sizes)])
        axes.minorticks_off()
        axes.set_xlabel("parameters")
        legend(axes, theme)
        style(figure, axes, theme)
    return figure


def by_model(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each model, small models first."""
    models = sorted({record.model for record in records}, key=lambda m: (size(m) or 0, m))
    return {model: [r for r in records if r.model == model] for model in models}


def by_format(records: Sequence[Record]) -> dict[str, list[tuple[float, Point]]]:
    """For formats measured on several models: millions of parameters, and what was found."""
    found: dict[str, list[tuple[float, Point]]] = {}
    for model, chosen in by_model(records).items():
        millions = size(model)
        for point in points(chosen) if millions else []:
            if point.group == "preset" and millions:
                found.setdefault(point.name, []).append((millions, point))
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def size(model: str) -> float | None:
    """Millions of parameters, as a model's name says: "SmolLM2-135M", "gemma-3-270m", "7B"."""
    match = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([mb])(?![A-Za-z0-9])", model, re.I)
    return float(match[1]) * (1000 if match[2].lower() == "b" else 1) if match else None
