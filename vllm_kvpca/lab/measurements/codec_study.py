"""Records of the codec study (benchmarks/codec_study.py): their rows, and our formats in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_kvpca.codec.bands import RAW_BITS
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table, change, ratios
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


def rows_of(group: str) -> Callable[[Record], list[list[str]]]:
    """A line for each option of one group of the codec study."""

    def rows(record: Record) -> list[list[str]]:
        results: Any = record.results
        return [_line(row) for row in results["rows"] if row["group"] == group]

    return rows


def best_records(group: str) -> Callable[[Sequence[Record], Sequence[Record]], list[Record]]:
    """Of records those with options of the group, each only with the rows for which it is the
    best."""

    def choose(chosen: Sequence[Record], records: Sequence[Record]) -> list[Record]:
        best = [
            one.model_copy(update={"results": one.results | {"rows": best_rows(one, chosen)}})
            for one in chosen
        ]
        return [record for record in best if rows_of(group)(record)]

    return choose


def _line(row: dict[str, Any]) -> list[str]:
    left = [f"first {row['first_tokens_raw']} tokens"] if row["first_tokens_raw"] else []
    left += [f"{row['edge_layers_raw']} layers at each end"] if row["edge_layers_raw"] else []
    return [
        row["name"],
        *(f"`{row[which]}`" if row[which] != "raw" else "raw" for which in "kv"),
        ", ".join(left) or "-",
        f"{row['bits_per_element']:.2f}",
        ratios(row),
        change(row),
        f"{row['kl_mean_nats']:.5f}",
        f"{row['top1_agreement']:.2%}",
    ]


_HEADS = [
    "what",
    "K",
    "V",
    "left raw",
    "bits per element",
    "raw / stored bytes of K and V (of V alone)",
    "perplexity change (95 % interval)",
    "KL (nats)",
    "same likeliest token",
]
_GROUPS = {
    "codec-together": "together",
    "codec-signed": "signed",
    "codec-peers": "peers",
    "codec-v": "V alone",
    "codec-k": "K alone",
}
TABLES = {
    name: Table(
        _HEADS,
        rows_of(group),
        "python benchmarks/codec_study.py",
        kind="codec-study",
        choose=best_records(group),
    )
    for name, group in _GROUPS.items()
}
