"""What all figures share: colours of a light and a dark page, and matplotlib set up for files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Theme:
    """Colours of one page background. Raw and archive differ in lightness too, so the figure
    can be read without colour."""

    name: str
    paper: str
    ink: str
    faint: str
    raw: str
    archive: str


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#d0d7de", "#d67d1c", "#2f6db5"),
    Theme("dark", "#0d1117", "#e6edf3", "#30363d", "#f2b264", "#3f7fc9"),
)


def pyplot() -> Any:
    """matplotlib's pyplot, without a screen and with the same output in every run."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "vllm-kvpca"  # else element ids differ in every run
    from matplotlib import pyplot

    return pyplot


def style(figure: Any, axes: Any, theme: Theme) -> None:
    """Colours of the page, of the axes and of a light grid."""
    figure.set_facecolor(theme.paper)
    axes.set_facecolor(theme.paper)
    axes.grid(axis="y", color=theme.faint, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink)
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)
