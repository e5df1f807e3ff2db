"""What all figures share: colours of a light and a dark page, and how a figure becomes a file."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvpca.lab.record import Record

DPI = 150
ORIGIN = "Records"
"""PNG text chunk with the checksum of the records a figure was drawn from; see `checksum`."""


@dataclass(frozen=True)
class Theme:
    """Colours of one page background. Raw and archive differ in lightness too, so the figure
    can be read without colour; `cycle` are told apart with most colour blindness (after Okabe
    and Ito)."""

    name: str
    paper: str
    ink: str
    faint: str
    raw: str
    archive: str
    cycle: tuple[str, ...]
    heat: str


THEMES = (
    Theme(
        "light",
        "#ffffff",
        "#1f2328",
        "#d0d7de",
        "#d67d1c",
        "#2f6db5",
        ("#2f6db5", "#d67d1c", "#12805c", "#b0428f", "#6e7781", "#1995b5"),
        "YlGnBu",
    ),
    Theme(
        "dark",
        "#0d1117",
        "#e6edf3",
        "#30363d",
        "#f2b264",
        "#3f7fc9",
        ("#6cabf0", "#f2b264", "#45c493", "#e58ac6", "#9aa4af", "#62d0ea"),
        "YlGnBu_r",
    ),
)


def pyplot() -> Any:
    """matplotlib's pyplot, without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def style(figure: Any, axes: Any, theme: Theme) -> None:
    """Colours of the page, of the axes and of a light grid."""
    figure.set_facecolor(theme.paper)
    axes.set_facecolor(theme.paper)
    axes.grid(axis="y", color=theme.faint, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.ink, which="both")
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.faint)


def title(axes: Any, text: str, theme: Theme) -> None:
    axes.set_title(text, loc="left", color=theme.ink, fontsize=10.5)


def legend(axes: Any, theme: Theme, **more: Any) -> None:
    options = {"frameon": False, "labelcolor": theme.ink, "fontsize": 8.5, **more}
    axes.legend(**options)


def legend_below(figure: Any, axes: Any, theme: Theme) -> None:
    """Under the figure, where nothing is drawn."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=len(labels),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=8.5,
    )


def token_ticks(axes: Any, lengths: Sequence[int]) -> None:
    """A logarithmic axis of tokens with a few plain labels."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n // 1024}k" if n >= 1024 else f"{n}" for n in lengths])
    axes.minorticks_off()


def checksum(records: Sequence[Record]) -> str:
    """Of what a figure is drawn from: it changes with any of its records."""
    digest = hashlib.sha256()
    for record in sorted(records, key=lambda one: one.file_name):
        digest.update(record.model_dump_json().encode())
    return digest.hexdigest()[:16]


def save(figure: Any, path: Path, records: Sequence[Record], dpi: int = DPI) -> None:
    """Write a PNG of few colours (a third of the size), with the checksum of its records."""
    from PIL import Image, PngImagePlugin

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    pyplot().close(figure)
    info = PngImagePlugin.PngInfo()
    info.add_text(ORIGIN, checksum(records))
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(path, optimize=True, pnginfo=info)


def origin(path: Path) -> str | None:
    """Checksum of the records that a figure was drawn from, None if it has none."""
    from PIL import Image

    with Image.open(path) as image:
        return image.info.get(ORIGIN)
