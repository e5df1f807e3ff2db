"""Figures from records, each for a light and a dark page, as SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_kvpca.evaluation.block_life import mib
from vllm_kvpca.evaluation.record import Record
from vllm_kvpca.plots.dashboard import draw_dashboard
from vllm_kvpca.plots.themes import THEMES, Theme, pyplot, style


def draw_all(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw every figure for which there are records; returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for record in records:
        if record.kind == "block-life":
            for theme in THEMES:
                paths += block_life(record, theme, folder)
        if record.kind == "dashboard":
            for theme in THEMES:
                paths += draw_dashboard(record, theme, folder)
    return paths


def block_life(record: Record, theme: Theme, folder: Path) -> list[Path]:
    """KV memory of one request over its computed tokens: raw and archive blocks on top of each
    other, and what stock holds for the same tokens."""
    life: Any = record.results["preset"]
    stock: Any = record.results["stock"]
    figure, axes = pyplot().subplots(figsize=(8, 4.2), layout="constrained")
    tokens = life["computed_tokens"][:-1]  # the last sample lies after the end
    raw, archive = mib(life, "raw")[:-1], mib(life, "archive")[:-1]
    axes.stackplot(tokens, archive, raw, step="post", colors=[theme.archive, theme.raw], lw=0)
    axes.step(stock["computed_tokens"][:-1], mib(stock)[:-1], where="post", color=theme.ink, lw=1.8)
    _label_areas(axes, tokens, archive, raw, mib(stock)[:-1], theme)
    _mark_prompt_end(axes, record, theme)
    settings = record.settings
    title = (
        f"KV memory of one request: {record.model}, {settings['preset']}, "
        f"compress after {settings['compress_after']}, keep {settings['keep_recent']} recent"
    )
    axes.set_title(title, loc="left", color=theme.ink, fontsize=10.5)
    axes.set_xlabel("computed tokens")
    axes.set_ylabel("MiB in use")
    axes.set_xlim(0, tokens[-1])
    axes.set_ylim(0, max(mib(stock)) * 1.08)
    style(figure, axes, theme)
    name = f"block-life-{settings['preset']}-{theme.name}"
    paths = [folder / f"{name}.{ending}" for ending in ("svg", "png")]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=160)
    pyplot().close(figure)
    return paths


def _label_areas(
    axes: Any,
    tokens: Sequence[int],
    archive: Sequence[float],
    raw: Sequence[float],
    stock: Sequence[float],
    theme: Theme,
) -> None:
    """Names beside the areas, with what each holds at the end."""
    end = tokens[-1]

    def label(text: str, y: float, color: str) -> None:
        axes.annotate(
            text,
            (end, y),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color,
            annotation_clip=False,
        )

    label(f"stock: {stock[-1]:.0f} MiB", stock[-1], theme.ink)
    label(f"raw: {raw[-1]:.0f} MiB", archive[-1] + raw[-1] / 2, theme.raw)
    label(f"archive: {archive[-1]:.0f} MiB", archive[-1] / 2, theme.archive)


def _mark_prompt_end(axes: Any, record: Record, theme: Theme) -> None:
    prompt: Any = record.settings["prompt_tokens"]
    axes.axvline(prompt, color=theme.ink, lw=0.8, ls=":")
    axes.annotate(
        "end of prompt",
        (prompt, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        fontsize=8.5,
        color=theme.paper,
    )
