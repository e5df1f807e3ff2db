"""Quality records to what shipped presets say about themselves: measured.json and the cards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_kvpca.calibration.card import MEASURED_ROW
from vllm_kvpca.lab.measurements.codec_study import all_rows, row_of
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import change
from vllm_kvpca.preset import list_shipped, load_preset
from vllm_kvpca.preset.find import shipped_root
from vllm_kvpca.preset.measured import FILE, Measured, describe, to_json
from vllm_kvpca.preset.names import same_family, same_model
from vllm_kvpca.preset.schema import PresetConfig


def measured(records: Sequence[Record]) -> dict[str, list[Measured]]:
    """For each shipped preset what records of kind "quality" say, hardest case first."""
    found: dict[str, list[Measured]] = {}
    for record in records:
        settings: Any = record.settings
        if record.kind != "quality":
            continue
        for name, folder in list_shipped().items():
            if name.rpartition("/")[2] == settings["preset"] and _is_for(name, folder, record):
                found.setdefault(name, []).append(_row(record))
    return {name: sorted(rows, key=_order) for name, rows in found.items()}


def files(records: Sequence[Record]) -> dict[Path, str]:
    """Every file of the shipped presets that follows from records, to its text."""
    found = measured(records)
    texts = {shipped_root() / FILE: to_json(found)}
    for name, folder in list_shipped().items():
        if folder and (card := folder / "README.md").is_file():
            config = load_preset(name).config
            words = describe(found.get(name, []), not config.calibrated) + _strict(config, records)
            texts[card] = _filled(card.read_text(), words)
    return texts


def _strict(config: PresetConfig, records: Sequence[Record]) -> str:
    """What the codec study of a calibrated preset's model says about its format, in words."""
    if not config.calibrated or config.model is None:
        return ""
    studies = [
        r for r in records if r.kind == "codec-study" and same_model(config.model.name, r.model)
    ]
    row = row_of(config.format, all_rows(studies))
    if row is None:
        return ""
    return (
        f"; {change(row)} by the strict measure, where no token sees a raw one, its own included "
        "(codec study, a basis fitted the same way)"
    )


def _is_for(name: str, folder: Path | None, record: Record) -> bool:
    """Whether the record's model is the preset's; one without a folder fits any model."""
    if folder is None:
        return True
    config = load_preset(name).config
    same = same_model if config.calibrated else same_family
    return config.model is None or same(config.model.name, record.model)


def _row(record: Record) -> Measured:
    settings: Any = record.settings
    results: Any = record.results
    low, high = results["perplexity_change_ci95"]
    return Measured(
        model=record.model,
        dtype=results["dtype"],
        compress_after=settings["compress_after"],
        keep_recent=settings["keep_recent"],
        archived=results["archived_share_of_attended_keys"],
        change=results["perplexity_change"],
        low=low,
        high=high,
        tokens=results["predicted_tokens"],
        record=record.file_name,
    )


def _order(row: Measured) -> tuple[Any, ...]:
    # float16 rounds least, so it shows the codec and not the dtype.
    return row.model, row.compress_after, row.dtype != "float16", row.dtype


def _filled(card: str, measured: str) -> str:
    lines = card.splitlines(keepends=True)
    return "".join(
        f"{MEASURED_ROW} {measured} |\n" if line.startswith(MEASURED_ROW) else line
        for line in lines
    )
