"""Figures of quality: what compression costs, by format, by model and by model size."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_kvpca.lab.measurements.codec_study import all_rows, formats, row_of
from vllm_kvpca.lab.plots.themes import Theme, legend_below, pyplot, style, title
from vllm_kvpca.lab.record import Record

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
    """All formats, with every token archived that can be: presets through the engine."""
    chosen = _hardest([r for r in records if r.kind == "quality"])
    found = [_point(_settings(r)["preset"], "preset", r.settings, r.results) for r in chosen]
    return sorted(found, key=_along)


def study_points(records: Sequence[Record]) -> list[Point]:
    """All options of one model's codec studies; formats of ours count as presets."""
    rows = all_rows(records)
    stock = _results(records[-1])["perplexity_stock"]
    ours = {id(row): name for name in formats() if (row := row_of(name, rows))}
    found = []
    for row in rows:
        group = "peers" if row["group"] == "peers" else "study"
        name = ours.get(id(row), row["name"])
        results = {**row, "perplexity": stock * (1 + row["perplexity_change"])}
        found.append(_point(name, "preset" if id(row) in ours else group, row, results))
    return sorted(found, key=_along)


def _results(record: Record) -> Any:
    return record.results


def _along(point: Point) -> tuple[float, str]:
    return point.ratio, point.name


def _settings(record: Record) -> Any:
    return record.settings


def _hardest(records: Sequence[Record]) -> list[Record]:
    """Those with every token archived, in the dtype that rounds least if there are any."""
    archived = [record for record in records if record.settings["compress_after"] == 0]
    return [record for record in archived if record.results["dtype"] == "float16"] or archived


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
    """Loss over total ratio of one model: all options of the codec study and peers; without a
    study the presets through the engine. The two are not mixed: the study's tokens attend to
    themselves as stored, the engine's to the last few raw ones."""
    studies = [record for record in records if record.kind == "codec-study"]
    found = study_points(studies) if studies else points(records)
    figure, axes = pyplot().subplots(figsize=(10, 5), layout="constrained")
    kinds = {
        "study": ("other options tried", theme.cycle[4], "o", 14, 1),
        "peers": ("peers, emulated on the same text", theme.cycle[1], "D", 34, 3),
        "preset": ("our formats", theme.cycle[0], "o", 46, 4),
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
    how = "no token sees a raw one" if studies else "through the engine, newest tokens raw"
    title(axes, f"{records[0].model}: compression against quality ({how})", theme)
    legend_below(figure, axes, theme)
    style(figure, axes, theme)
    return figure


def _name(axes: Any, chosen: Sequence[Point], theme: Theme) -> None:
    """Names in the colour of their group; points on top of each other share one name."""
    colours = {"peers": theme.cycle[1], "preset": theme.cycle[0]}
    places = _together(chosen)
    for point, names in places.items():
        _label(axes, point, ", ".join(names), list(places), colours[point.group])


def _together(chosen: Sequence[Point]) -> dict[Point, list[str]]:
    """The names at each place: points on top of each other share one."""
    places: dict[Point, list[str]] = {}
    for point in chosen:
        same = (p for p in places if _close(p, point, 0.02, 1.15) and p.group == point.group)
        places.setdefault(next(same, point), []).append(point.name.removeprefix("vLLM "))
    return places


def _close(one: Point, other: Point, ratio: float, factor: float) -> bool:
    """Whether two points are drawn near each other; `factor` is that of their losses."""
    low, high = sorted((one.loss, other.loss))
    return abs(one.ratio - other.ratio) < ratio and high <= factor * low + 0.1 * (factor - 1)


def _label(axes: Any, point: Point, text: str, others: Sequence[Point], colour: str) -> None:
    """A name beside a point: below it if one close by is above, left if one is to the right and
    none to the left."""
    near = [o for o in others if _close(o, point, 0.35, 3)]
    below = any(o.loss > point.loss for o in near)
    beside = [o for o in near if _close(o, point, 0.35, 1.5)]
    right = any(o.ratio > point.ratio + 0.02 for o in beside)
    free = not any(0 < point.ratio - o.ratio < 0.6 and _close(o, point, 0.6, 2.5) for o in others)
    left = point.ratio > 1.5 and right and free
    axes.annotate(
        text,
        (point.ratio, point.loss),
        xytext=(-6 if left else 6, -5 if below else 5),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top" if below else "bottom",
        fontsize=8,
        color=colour,
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
        title(axes, f"{model}, through the engine, newest tokens raw", theme)
        style(figure, axes, theme)
    return figure


def same_text(records: Sequence[Record]) -> list[Record]:
    """The largest set of records that read the same tokens: perplexities of different texts do
    not compare."""
    by_text: dict[Any, list[Record]] = {}
    for record in _hardest(records):
        names = tuple(text.sha256 for text in record.texts)
        by_text.setdefault((names, record.results["predicted_tokens"]), []).append(record)
    return max(by_text.values(), key=lambda chosen: (len(chosen), chosen[0].date))


def _one_model(axes: Any, found: Sequence[Point], theme: Theme) -> None:
    stock = found[0].perplexity / (1 + found[0].loss / 100)
    top = stock * (1 + 1.5 * max((p.loss for p in found if p.loss < _OFF), default=1) / 100)
    axes.axhline(stock, color=theme.ink, lw=1, ls="--")
    right = max(point.ratio for point in found) * 1.14
    label = f"stock: {stock:.3f}"
    axes.text(right, stock, label, va="bottom", ha="right", fontsize=8.5, color=theme.ink)
    places = _together(found)
    for place, names in places.items():
        off = place.loss >= _OFF
        y = top - (top - stock) / 10 if off else place.perplexity
        axes.scatter(place.ratio, y, 46, color=theme.cycle[0], marker="^" if off else "o", zorder=3)
        above = [o for o in places if place.loss < o.loss < _OFF]
        below = any(abs(other.ratio - place.ratio) < 0.35 for other in above)
        axes.annotate(
            f"{', '.join(names)}: {place.perplexity:.3f}",
            (place.ratio, y),
            xytext=(0, -7 if below else 7),
            textcoords="offset points",
            ha="center",
            va="top" if below else "bottom",
            fontsize=8,
            color=theme.ink,
        )
    axes.set_ylim(stock - (top - stock) / 8, top)
    axes.set_xlim(0.9, max(p.ratio for p in found) * 1.15)
    axes.set_xlabel("raw bytes / archived bytes of K and V, scales included")
    axes.set_ylabel("perplexity (triangle: above)")
    axes.ticklabel_format(axis="y", useOffset=False)


def draw_sizes(records: Sequence[Record], theme: Theme) -> Any:
    """Ratio and loss over the model's size, a line for each format that several models have."""
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    sizes: set[float] = set()
    for index, (name, found) in enumerate(by_format(records).items()):
        rounds, place = divmod(index, len(theme.cycle))
        colour, line = theme.cycle[place], ("o-", "s--", "D:")[rounds % 3]
        x = [size for size, _ in found]
        sizes.update(x)
        left.plot(x, [p.ratio for _, p in found], line, color=colour, label=name)
        bars = [[p.loss - p.low for _, p in found], [p.high - p.loss for _, p in found]]
        y = [p.loss for _, p in found]
        right.errorbar(x, y, bars, fmt=line, color=colour, label=name, elinewidth=1)
    title(left, "Raw / archived bytes of K and V", theme)
    how = "codec study" if records[0].kind == "codec-study" else "through the engine"
    title(right, f"Perplexity against stock ({how})", theme)
    _loss_axis(right, theme)
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(sorted(sizes), [f"{size:,.0f}M" for size in sorted(sizes)])
        axes.minorticks_off()
        axes.set_xlabel("parameters")
        style(figure, axes, theme)
    legend_below(figure, left, theme)
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
        studies = [record for record in chosen if record.kind == "codec-study"]
        both = study_points(studies) if studies else points(chosen)
        for point in both:
            if millions and point.group == "preset":
                found.setdefault(point.name, []).append((millions, point))
    return {name: rows for name, rows in found.items() if len(rows) > 1}


def size(model: str) -> float | None:
    """Millions of parameters, as a model's name says: "SmolLM2-135M", "gemma-3-270m", "7B"."""
    match = re.search(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([mb])(?![A-Za-z0-9])", model, re.I)
    return float(match[1]) * (1000 if match[2].lower() == "b" else 1) if match else None
