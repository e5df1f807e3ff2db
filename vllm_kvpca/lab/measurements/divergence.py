"""How far greedy answers go together: tokens until a compressed answer parts from stock's.

A single near tie decides where two greedy answers part, and after that they have different
beginnings: a length, not an error. What it means shows beside the control, stock against itself
with another order of summation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_kvpca.lab.measurements.identity import Answer, identical_tokens


def compare(
    stock: Sequence[Answer], other: Sequence[Answer], lengths: Sequence[int]
) -> dict[str, Any]:
    """The results of a record.

    Answers that never part count with their full length, so a quartile of that length means "at
    least".

    Args:
        lengths: tokens of each prompt.
    """
    rows: list[dict[str, Any]] = []
    for length, ours, theirs in zip(lengths, stock, other, strict=True):
        same = identical_tokens(ours.tokens, theirs.tokens)
        parted = same < len(ours.tokens)
        gap = ours.gaps[same] if parted else None
        rows.append(
            {"prompt_tokens": length, "same_tokens": same, "parted": parted, "gap_nats": gap}
        )
    gaps = [row["gap_nats"] for row in rows if row["parted"]]
    return {
        "prompts": rows,
        "generated_tokens": len(stock[0].tokens),
        "same_tokens_quartiles": np.quantile(
            [row["same_tokens"] for row in rows], [0.25, 0.5, 0.75]
        ).tolist(),
        "never_parted": 1 - len(gaps) / len(rows),
        "gap_median_nats": float(np.median(gaps)) if gaps else None,
        "gap_largest_nats": max(gaps, default=None),
    }
