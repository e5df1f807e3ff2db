"""`vllm-kvpca presets`: what is shipped, how much it saves, what it was measured to cost."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvpca.errors import OptionsError

if TYPE_CHECKING:
    from vllm_kvpca.preset.measured import Measured

USUAL_HEAD_DIM = 128
"""Ratios of formats that fit any model are given for this head_dim, which most models have."""


def presets(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    from_records: Annotated[
        Path | None,
        typer.Option(help="Write what quality records in this folder say into the presets."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="With --from-records: change nothing, fail if stale.")
    ] = False,
) -> None:
    """List the shipped presets."""
    if from_records:
        _update(from_records, check)
        return
    rows = list_rows()
    if as_json:
        print(json.dumps([{**row, "measured": _plain(row["measured"])} for row in rows], indent=2))
        return
    table = Table(
        caption=f"Ratio: raw bytes / archived bytes, scales included; total is K and V. For any "
        f"model: at head_dim {USUAL_HEAD_DIM}. Measured: perplexity against stock vLLM (95 % "
        "interval), and the share of attended keys that were archived.",
        caption_justify="left",
    )
    for column in ("name", "model"):
        table.add_column(column, overflow="fold")
    for column in ("total ratio", "V ratio"):
        table.add_column(column, justify="right")
    table.add_column("measured", overflow="fold")
    for row in rows:
        ratios = (f"{row['total_ratio']:.2f}", f"{row['v_ratio']:.2f}")
        table.add_row(row["name"], row["model"] or "any", *ratios, _measured(row))
    Console().print(table)


def list_rows() -> list[dict[str, Any]]:
    """A dictionary for each shipped preset: name, model (None: any), format, description,
    total_ratio and v_ratio at head_dim, and the rows that were measured."""
    from vllm_kvpca.preset import list_shipped, load_preset
    from vllm_kvpca.preset.measured import load_measured

    measured = load_measured()
    rows = []
    for name in list_shipped():
        config = (preset := load_preset(name)).config
        head_dim = config.model.head_dim if config.model else USUAL_HEAD_DIM
        layout = preset.layout(head_dim)
        rows.append(
            {
                "name": name,
                "model": config.model.name if config.model else None,
                "format": config.format,
                "description": config.description,
                "head_dim": head_dim,
                "total_ratio": layout.total_ratio,
                "v_ratio": layout.v_ratio,
                "measured": measured.get(name, []),
            }
        )
    return rows


def _plain(rows: list[Measured]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def _measured(row: dict[str, Any]) -> str:
    """Of every model the hardest case; the model is named where the preset fits any."""
    from vllm_kvpca.preset.measured import NOT_MEASURED, hardest

    lines = [
        one.short + ("" if row["model"] else f", {one.model}") for one in hardest(row["measured"])
    ]
    return "\n".join(lines) or NOT_MEASURED


def _update(records: Path, check: bool) -> None:
    from vllm_kvpca.lab.docs.preset_cards import files
    from vllm_kvpca.lab.record import load_all

    texts = files(load_all(records))
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if check and stale:
        raise OptionsError(
            f"stale: {', '.join(map(str, stale))}. Run vllm-kvpca presets --from-records {records}."
        )
    for path in stale:
        path.write_text(texts[path])
        print(path)
