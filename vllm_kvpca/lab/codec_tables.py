"""Tables of the codec study (benchmarks/codec_study.py)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm_kvpca.lab.cells import change, ratios
from vllm_kvpca.lab.measurements.codec_study import best_rows
from vllm_kvpca.lab.record import Record


def codec_rows(group: str) -> Callable[[Record], list[list[str]]]:
    """A line for each option of one group of the codec study."""

    def rows(record: Record) -> list[list[str]]:
        results: Any = record.results
        return [_line(row) for row in results["rows"] if row["group"] == group]

    return rows


def chosen_records(group: str, records: Sequence[Record]) -> list[Record]:
    """Records with options of the group, each only with the rows for which it is the best."""
    best = [
        record.model_copy(update={"results": record.results | {"rows": best_rows(record, records)}})
        for record in records
    ]
    return [record for record in best if codec_rows(group)(record)]


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


CODEC_HEADS = [
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
CODEC_TABLES = {
    "codec-together": "together",
    "codec-signed": "signed",
    "codec-peers": "peers",
    "codec-v": "V alone",
    "codec-k": "K alone",
}
"""Tables of the codec study, and the group of options that each shows."""
