"""`vllm-kvpca presets`: what is shipped, how much it saves, what it was measured to cost."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

USUAL_HEAD_DIM = 128
"""Ratios of formats that fit any model are given for this head_dim, which most models have."""


def presets() -> None:
    """List the shipped presets."""
    from vllm_kvpca.preset import list_shipped

    table = Table(
        caption=f"Ratio: raw bytes / archived bytes, scales included; total is K and V. For any "
        f"model: at head_dim {USUAL_HEAD_DIM}. Delta: perplexity against stock vLLM.",
        caption_justify="left",
    )
    for column in ("name", "model", "format"):
        table.add_column(column, overflow="fold")
    for column in ("total ratio", "V ratio"):
        table.add_column(column, justify="right")
    table.add_column("measured delta", overflow="fold")
    for name, folder in list_shipped().items():
        table.add_row(*_row(name, folder))
    Console().print(table)


def _row(name: str, folder: Path | None) -> tuple[str, ...]:
    from vllm_kvpca.calibration.card import NOT_MEASURED, measured_delta
    from vllm_kvpca.preset import load_preset

    preset = load_preset(name)
    model = preset.config.model
    layout = preset.layout(model.head_dim if model else USUAL_HEAD_DIM)
    card = folder / "README.md" if folder else None
    return (
        name,
        model.name if model else "any",
        preset.config.format,
        f"{layout.total_ratio:.2f}",
        f"{layout.v_ratio:.2f}",
        measured_delta(card.read_text()) if card and card.is_file() else NOT_MEASURED,
    )
