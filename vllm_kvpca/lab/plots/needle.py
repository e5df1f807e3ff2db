"""Heat maps of what is found again in a long text, by depth and length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.lab.plots.themes import Theme, pyplot, style, title
from vllm_kvpca.lab.record import Record


def draw_needle(records: Sequence[Record], theme: Theme) -> Any:
    """Share of the answers' tokens that are right: stock, then each preset; equal scales."""
    records = sorted(records, key=lambda one: (_about(one)["total_ratio"], one.slug))
    maps = [("stock", records[0], "token_accuracy_stock")]
    for one in records:
        about = _about(one)
        name = f"{about['preset']}, {about['compress_after']}/{about['keep_recent']}"
        maps.append((name, one, "token_accuracy"))
    columns = min(4, len(maps))
    rows = -(-len(maps) // columns)
    figure, grid = pyplot().subplots(
        rows, columns, figsize=(3.4 * columns, 3.1 * rows), layout="constrained", squeeze=False
    )
    for axes, (name, record, key) in zip(grid.flat, maps, strict=False):
        values, about = _grid(record, key), _about(record)
        image = axes.imshow(values, vmin=0, vmax=1, cmap=theme.heat, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                light = sum(image.cmap(value)[:3]) > 1.5
                colour = "#1f2328" if light else "#ffffff"
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", fontsize=8, color=colour)
        axes.set_xticks(range(len(about["lengths"])), [f"{n:,}" for n in about["lengths"]])
        axes.set_yticks(range(len(about["depths"])), [f"{d:.0%}" for d in about["depths"]])
        title(axes, name, theme)
        style(figure, axes, theme)
        axes.grid(visible=False)
    for axes in list(grid.flat)[len(maps) :]:
        axes.set_visible(False)
    for row in grid:
        row[0].set_ylabel("depth of the fact")
    for axes in grid[-1]:
        axes.set_xlabel("tokens of the prompt")
    what = {"needle": "a fact in a long text", "recall": "values of keys"}[records[0].kind]
    figure.suptitle(
        f"{records[0].model}: right answer tokens, {what}", color=theme.ink, x=0.01, ha="left"
    )
    return figure


def _about(record: Record) -> Any:
    return record.settings


def _grid(record: Record, key: str) -> list[list[float]]:
    """Rows by depth, columns by length."""
    cells: Any = record.results["cells"]
    found = {(cell["length_tokens"], cell["depth"]): cell[key] for cell in cells}
    about = _about(record)
    return [[found[length, depth] for length in about["lengths"]] for depth in about["depths"]]
