"""Records of the codec study (benchmarks/codec_study.py): their rows, and our formats in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.codec.bands import RAW_BITS
from vllm_kvpca.lab.record import Record
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS, FORMATS
from vllm_kvpca.preset.schema import TensorFormat

_SIGNED = " signed"
"""How the codec study spells the 4-bit codes of the product, which use all 16 levels."""


def all_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The rows of one model's records; see `best_rows`."""
    return [row for record in records for row in best_rows(record, records)]


def best_rows(record: Record, records: Sequence[Record]) -> list[dict[str, Any]]:
    """A record's rows but for options that another record of its model measured on more tokens."""
    others = [r for r in records if r.model == record.model and _tokens(r) > _tokens(record)]
    better = {_option(row) for other in others for row in _rows(other)}
    return [row for row in _rows(record) if _option(row) not in better]


def _rows(record: Record) -> list[dict[str, Any]]:
    results: Any = record.results
    return list(results["rows"])


def _tokens(record: Record) -> int:
    settings: Any = record.settings
    return int(settings.get("predicted_tokens", 0))


def _option(row: dict[str, Any]) -> tuple[str, str]:
    return row["group"], row["name"]


def row_of(name: str, rows: Sequence[Any]) -> Any:
    """The row that does what a format does; one with 15 levels, if none has 16."""
    wanted = formats()[name]
    k, v = (_spec(which, wanted) for which in "kv")
    plain = [row for row in rows if not (row["first_tokens_raw"] or row["edge_layers_raw"])]
    for keys in ((k, v), (k.removesuffix(_SIGNED), v.removesuffix(_SIGNED))):
        if found := [row for row in plain if (row["k"], row["v"]) == keys]:
            return found[-1]
    return None


def formats() -> dict[str, Any]:
    """Every format of the product by name."""
    return {**FORMATS, **CALIBRATED_FORMATS}


def _spec(which: str, wanted: Any) -> str:
    """K's or V's format in the words of the codec study, e.g. "weighted+mix 1/4:8 3/4:4 signed"."""
    tensor: TensorFormat = getattr(wanted, which)
    if tensor.bands[0].bits == RAW_BITS:
        return "raw"
    basis: str = tensor.basis
    if which == "k" and getattr(wanted, "query_weighted", False):
        basis = "weighted"
    if tensor.calibrated and wanted.mixed:
        basis += "+mix"
    bands = " ".join(f"{band.share}:{band.bits}" for band in tensor.bands)
    signed = _SIGNED if any(band.bits == 4 for band in tensor.bands) else ""
    return f"{basis} {bands}{signed}"
