"""Figures of memory: what one sequence holds, over its life and over its length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.lab.measurements.block_life import mib
from vllm_kvpca.lab.plots.themes import Theme, legend, pyplot, style, title, token_ticks
from vllm_kvpca.lab.record import Record


def draw_memory(records: Sequence[Record], theme: Theme) -> Any:
    """GiB of one sequence over its length, and how many times more stock holds."""
    (record,) = records
    settings: Any = record.settings
    results: Any = record.results
    lengths, stock = results["lengths_tokens"], results["stock_bytes"]
    figure, (left, right) = pyplot().subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.plot(lengths, [b / 2**30 for b in stock], color=theme.ink, lw=1.8, label="stock, bf16")
    for row, colour in zip(results["formats"], theme.cycle, strict=False):
        held = [raw + archive for raw, archive in zip(*_parts(row), strict=True)]
        left.plot(lengths, [b / 2**30 for b in held], color=colour, lw=1.8, label=row["format"])
        ratios = [before / after for before, after in zip(stock, held, strict=True)]
        right.plot(lengths, _smooth(ratios), color=colour, lw=1.8, label=row["format"])
        text = f"{row['format']}: {ratios[-1]:.2f}x of {row['total_ratio']:.2f}x"
        _beside(right, lengths[-1], ratios[-1], text, colour)
    left.set_yscale("log")
    left.set_ylabel("GiB of KV cache")
    title(left, f"One sequence of {record.model}", theme)
    legend(left, theme, loc="upper left")
    right.axvline(settings["compress_after"], color=theme.ink, lw=0.8, ls=":")
    right.set_ylabel("stock / compressed, mean over near lengths")
    right.set_ylim(0.8, None)
    thresholds = f"compress after {settings['compress_after']}, keep {settings['keep_recent']}"
    title(right, f"Saved ({thresholds} recent)", theme)
    for axes in (left, right):
        token_ticks(axes, [64, 256, 512, 1024, 4096, 16384, 131072])
        axes.set_xlim(lengths[0], lengths[-1])
        axes.set_xlabel("tokens in the sequence")
        style(figure, axes, theme)
    return figure


def _smooth(values: Sequence[float], reach: int = 4) -> list[float]:
    """Running mean, shorter towards the ends: lengths are samples of a saw of whole blocks."""
    means = []
    for i in range(len(values)):
        near = min(reach, i, len(values) - 1 - i)
        part = values[i - near : i + near + 1]
        means.append(sum(part) / len(part))
    return means


def _parts(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    return row["raw_bytes"], row["archive_bytes"]


def draw_block_life(records: Sequence[Record], theme: Theme) -> Any:
    """KV memory of one request over its computed tokens: raw and archive blocks on top of each
    other, and what stock holds for the same tokens."""
    (record,) = records
    life: Any = record.results["preset"]
    stock: Any = record.results["stock"]
    figure, axes = pyplot().subplots(figsize=(8, 4.2), layout="constrained")
    tokens = life["computed_tokens"][:-1]  # the last sample lies after the end
    raw, archive = mib(life, "raw")[:-1], mib(life, "archive")[:-1]
    held = mib(stock)[:-1]
    axes.stackplot(tokens, archive, raw, step="post", colors=[theme.archive, theme.raw], lw=0)
    axes.step(stock["computed_tokens"][:-1], held, where="post", color=theme.ink, lw=1.8)
    end = tokens[-1]
    _beside(axes, end, held[-1], f"stock: {held[-1]:.0f} MiB", theme.ink)
    _beside(axes, end, archive[-1] + raw[-1] / 2, f"raw: {raw[-1]:.0f} MiB", theme.raw)
    _beside(axes, end, archive[-1] / 2, f"archive: {archive[-1]:.0f} MiB", theme.archive)
    _mark_prompt_end(axes, record, theme)
    settings = record.settings
    text = (
        f"KV memory of one request: {record.model}, {settings['preset']}, "
        f"compress after {settings['compress_after']}, keep {settings['keep_recent']} recent"
    )
    title(axes, text, theme)
    axes.set_xlabel("computed tokens")
    axes.set_ylabel("MiB in use")
    axes.set_xlim(0, end)
    axes.set_ylim(0, max(held) * 1.08)
    style(figure, axes, theme)
    return figure


def _beside(axes: Any, x: float, y: float, text: str, colour: str) -> None:
    """A name at the end of a line, in its colour, outside the axes."""
    where = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
    axes.annotate(text, (x, y), color=colour, annotation_clip=False, fontsize=9, **where)


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
