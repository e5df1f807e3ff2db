"""Right and wrong answers of a preset beside stock's, to the same questions: figures and a table.

The pass rates differ by what falls this way or that; how many answers are the very same tells more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.calibration import statistics
from vllm_kvpca.lab.completions import Completion
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import PRESET_HEADS, THRESHOLDS_HEAD, after_and_recent, stored


def compare(
    names: Sequence[str],
    stock: Sequence[Completion],
    other: Sequence[Completion],
    right_stock: Sequence[bool],
    right: Sequence[bool],
) -> dict[str, Any]:
    """Figures of a record.

    Args:
        names: of the questions; those that only one of both got right are listed.

    Returns:
        Counts of right, identical and cut answers, the change of the share of right ones with its
        95 % interval, and the p-value of McNemar's exact test.
    """
    pairs = list(zip(names, right_stock, right, strict=True))
    only_stock = [name for name, a, b in pairs if a and not b]
    only_preset = [name for name, a, b in pairs if b and not a]
    counts = len(only_stock), len(only_preset)
    low, high = statistics.paired_difference(*counts, len(names))
    same = [a.tokens == b.tokens for a, b in zip(stock, other, strict=True)]
    return {
        "answers": len(names),
        "right_stock": sum(right_stock),
        "right": sum(right),
        "change": (counts[1] - counts[0]) / len(names),
        "change_ci95": [low, high],
        "mcnemar_p": statistics.mcnemar(*counts),
        "only_stock_right": only_stock,
        "only_preset_right": only_preset,
        "identical_answers": sum(same),
        "cut_stock": sum(one.cut for one in stock),
        "cut": sum(one.cut for one in other),
    }


def row(record: Record) -> list[str]:
    results: Any = record.results
    low, high = results["change_ci95"]
    count = results["answers"]
    return [
        *stored(record),
        after_and_recent(record),
        results["dtype"],
        f"{results['right_stock']} ({results['right_stock'] / count:.1%})",
        f"{results['right']} ({results['right'] / count:.1%})",
        f"{results['change']:+.1%} ({low:+.1%} to {high:+.1%})",
        f"{len(results['only_stock_right'])} / {len(results['only_preset_right'])}",
        f"{results['mcnemar_p']:.2g}",
        f"{results['identical_answers']} ({results['identical_answers'] / count:.0%})",
        f"{count:,}",
    ]


HEADS = [
    *PRESET_HEADS,
    THRESHOLDS_HEAD,
    "dtype",
    "right, stock",
    "right",
    "change (95 % interval)",
    "right in stock alone / in the preset alone",
    "McNemar's p",
    "answers identical to stock's",
    "answers",
]


def summary(found: dict[str, Any]) -> str:
    """One line for the terminal."""
    return (
        f"{found['right']} of {found['answers']} right, stock {found['right_stock']}; "
        f"{found['identical_answers']} answers identical"
    )
