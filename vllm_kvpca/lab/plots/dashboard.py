"""The dashboard's queries over one run, drawn from a record: what Grafana would show, in our own
drawing (no Grafana took part)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.lab.plots.themes import Theme, pyplot, style
from vllm_kvpca.lab.record import Record

_COLUMNS = 4
_SCALES = {"bytes": (2**20, "MiB"), "percentunit": (0.01, "%"), "s": (1, "s"), "x": (1, "x")}


def draw_dashboard(records: Sequence[Record], theme: Theme) -> Any:
    """One small chart per panel, in the order of the dashboard."""
    panels: Any = records[0].results["panels"]
    rows = -(-len(panels) // _COLUMNS)
    figure, grid = pyplot().subplots(rows, _COLUMNS, figsize=(16, 2.5 * rows), layout="constrained")
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw(axes, panel, theme)
        style(figure, axes, theme)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    return figure


def _draw(axes: Any, panel: dict[str, Any], theme: Theme) -> None:
    factor, unit = _SCALES.get(panel["unit"], (1, ""))
    colours = (theme.raw, theme.archive, theme.ink)
    shown = [one for one in panel["series"] if one["points"]]
    times = [time for time, _ in shown[0]["points"]] if shown else []
    values = [[value / factor for _, value in one["points"]] for one in shown]
    names = [one["legend"] for one in shown]
    if panel["stacked"] and all(len(v) == len(times) for v in values):
        by_state = {"raw": theme.raw, "archived": theme.archive, "free": theme.faint}
        tints = [by_state.get(name, theme.ink) for name in names]
        axes.stackplot(times, *values, labels=names, colors=tints, lw=0)
    else:
        for index, (one, line) in enumerate(zip(shown, values, strict=True)):
            points = [time for time, _ in one["points"]]
            axes.plot(points, line, label=names[index], color=colours[index % 3], lw=1.4)
    title = panel["title"] + (f" ({unit})" if unit else "")
    axes.set_title(title, loc="left", fontsize=9, color=theme.ink)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)  # room for the legend
    axes.tick_params(labelsize=7)
    axes.legend(fontsize=7, frameon=False, labelcolor=theme.ink, loc="upper right")
