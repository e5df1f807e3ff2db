"""`vllm-kvpca presets`: what is shipped, how much it saves, what it was measured to cost."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vllm_kvpca.errors import OptionsError

if TYPE_CHECKING:
    from vllm_kvpca.preset.measured import Measured

USUAL_HEAD_DIM = 128
"""Ratios of formats that fit any model are given for this head_dim, which most models have."""
WIDTH = 80
_LEGEND = f"""\
total and V: raw bytes / archived bytes of K and V, and of V alone, scales included; for any model \
at head_dim {USUAL_HEAD_DIM}. loss: relative change of perplexity against stock vLLM, the hardest \
case that was measured; - if none was. More of each: vllm-kvpca presets NAME, or --verbose."""


def presets(
    name: Annotated[
        list[str] | None,
        typer.Argument(help="Show these in detail: a shipped name, a folder or a Hub repository."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show all shipped presets in detail.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
    from_records: Annotated[
        Path | None,
        typer.Option(help="Write what quality records in this folder say into the presets."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="With --from-records: change nothing, fail if stale.")
    ] = False,
) -> None:
    """List the shipped presets, a line for each; those that are named in detail."""
    if from_records:
        _update(from_records, check)
        return
    rows = list_rows(name)
    if as_json:
        print(json.dumps([{**row, "measured": _plain(row["measured"])} for row in rows], indent=2))
    elif name or verbose:
        print("\n\n".join(_details(row) for row in rows))
    else:
        print("\n".join(_list(rows)))


def list_rows(names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """A dictionary for each preset: name, model (None: any), format, description, total_ratio and
    v_ratio at head_dim, and the rows that were measured.

    Args:
        names: see preset.load_preset; by default all shipped ones.

    Raises:
        PresetError: there is none of a name, or it is damaged.
    """
    from vllm_kvpca.preset import list_shipped, load_preset
    from vllm_kvpca.preset.measured import load_measured

    measured = load_measured()
    rows = []
    for name in names or list_shipped():
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


def _list(rows: list[dict[str, Any]]) -> list[str]:
    """A heading for each model, and below it a line for each preset, with its full name: what can
    be copied to --kv-compression-preset is never cut or wrapped."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"  {'':{width}}  total      V     loss"]
    for model, own in groupby(rows, key=lambda row: row["model"]):
        lines.append(model or "any model")
        lines += [
            f"  {row['name']:{width}}  {row['total_ratio']:.2f}x  {row['v_ratio']:.2f}x"
            f"  {_loss(row['measured']):>7}"
            for row in own
        ]
    return [*lines, "", *textwrap.wrap(_LEGEND, WIDTH)]


def _loss(rows: list[Measured]) -> str:
    """Of every model the hardest case, and of these the worst."""
    from vllm_kvpca.preset.measured import hardest

    changes = [row.change for row in hardest(rows)]
    return f"{max(changes):+.2%}" if changes else "-"


def _details(row: dict[str, Any]) -> str:
    from vllm_kvpca.preset.measured import describe

    ratio = (
        f"{row['total_ratio']:.2f}x (V alone {row['v_ratio']:.2f}x) at head_dim {row['head_dim']}, "
        "scales included"
    )
    lines = [
        ("", row["description"]),
        ("model", row["model"] or "any"),
        ("format", row["format"]),
        ("ratio", ratio),
        *(("measured", describe([one], with_model=True)) for one in row["measured"]),
    ]
    if not row["measured"]:
        lines.append(("measured", describe([], with_model=True)))
    lines.append(("", f"--kv-compression-preset {row['name']}"))
    return "\n".join([row["name"], *(_wrapped(title, text) for title, text in lines)])


def _wrapped(title: str, text: str) -> str:
    """Names are not broken: they are there to be copied."""
    first = f"  {title:10}" if title else "  "
    return textwrap.fill(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_on_hyphens=False,
        break_long_words=False,
    )


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
