"""Rows of the tables about answers; see tables."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.lab.cells import change, stored, thresholds
from vllm_kvpca.lab.record import Record

STORED = ["preset", "raw / archived bytes of K and V (of V alone)"]

FACTS_HEADS = [
    *STORED,
    "compress after / keep recent",
    "through",
    "dtype",
    "facts archived",
    "answers right, stock",
    "answers right",
    "digits right, stock",
    "digits right",
    "log-probability of a digit, change (95 % interval)",
    "answers",
]
DIVERGENCE_HEADS = [
    *STORED,
    "compress after / keep recent",
    "dtype",
    "same tokens: quartiles",
    "of",
    "never part",
    "gap at the first difference, median (nats)",
    "prompts",
]
TRANSFORMERS_HEADS = [
    *STORED,
    "compress after / keep recent",
    "dtype, transformers / engine",
    "perplexity change, transformers (95 % interval)",
    "through the engine",
    "KL, whole vocabulary (nats)",
    "its lower bound, transformers",
    "through the engine",
    "tokens",
]
TASKS_HEADS = ["preset", "compress after / keep recent", "task", "stock", "preset", "examples"]


def facts(record: Record) -> list[list[str]]:
    results: Any = record.results
    low, high = results["logprob_change_ci95"]
    archived = [cell["archived_share"] for cell in results["cells"]]
    return [
        [
            *stored(record),
            thresholds(record),
            str(record.settings["through"]),
            results["dtype"],
            f"{sum(archived) / len(archived):.0%}",
            f"{results['exact_stock']:.1%}",
            f"{results['exact']:.1%}",
            f"{results['token_accuracy_stock']:.1%}",
            f"{results['token_accuracy']:.1%}",
            f"{results['logprob_change']:+.4f} ({low:+.4f} to {high:+.4f})",
            f"{results['answers']:,}",
        ]
    ]


def divergence(record: Record) -> list[list[str]]:
    results: Any = record.results
    gap = results["gap_median_nats"]
    return [
        [
            *stored(record),
            "" if record.settings["preset"] == "stock" else thresholds(record),
            results["dtype"],
            ", ".join(f"{quartile:g}" for quartile in results["same_tokens_quartiles"]),
            f"{results['generated_tokens']}",
            f"{results['never_parted']:.0%}",
            "none parted" if gap is None else f"{gap:.3f}",
            f"{len(results['prompts'])}",
        ]
    ]


def transformers(record: Record) -> list[list[str]]:
    results: Any = record.results
    engine = results["engine"] or {"dtype": "not measured"}
    return [
        [
            *stored(record),
            thresholds(record),
            f"{results['dtype']} / {engine['dtype']}",
            change(results),
            f"{engine['perplexity_change']:+.2%}" if results["engine"] else "",
            f"{results['kl_mean_nats']:.5f}",
            f"{results['kl_lower_bound_mean_nats']:.5f}",
            f"{engine['kl_lower_bound_mean_nats']:.5f}" if results["engine"] else "",
            f"{results['predicted_tokens']:,}",
        ]
    ]


def tasks(record: Record) -> list[list[str]]:
    """A line for each task and metric."""
    results: Any = record.results
    return [
        [
            stored(record)[0],
            thresholds(record),
            f"{row['task']}: {row['metric']}",
            _with_error(row["stock"], row["stderr_stock"]),
            _with_error(row["preset"], row["stderr"]),
            f"{row['examples']}",
        ]
        for row in results["rows"]
    ]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
