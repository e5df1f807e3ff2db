"""How far greedy answers go together: tokens until a compressed answer parts from stock's.

A single near tie decides where two greedy answers part, and after that they have different
beginnings: a length, not an error. What it means shows beside the control, stock against itself
with another order of summation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kvpca.lab import presets, texts
from vllm_kvpca.lab.against_stock import (
    Done,
    Thresholds,
    nothing_done,
    overlaps,
    record_of,
    variants,
)
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.measurements.identity import Answer, answer, identical_tokens
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import PRESET_HEADS, THRESHOLDS_HEAD, Table, after_and_recent, stored


def run(
    model: str,
    preset_names: Sequence[str],
    text: Sequence[Path],
    prompts: int = 32,
    prompt_tokens: int = 1024,
    generated: int = 128,
    thresholds: Sequence[Thresholds] = ((0, 0), (512, 256)),
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "divergence": one for each preset and pair of thresholds, and a control.

    The control is stock against stock with steps of half as many tokens, as in `identity`.
    """
    presets.check(preset_names, model, peers=True)
    files = texts.find_texts(text)
    seen = overlaps(preset_names, files)
    windows = texts.windows(texts.tokenizer_of(model), files, prompts, prompt_tokens)
    common = EngineSettings(
        model=model,
        max_model_len=prompt_tokens + generated,
        max_num_seqs=prompts,
        seed=seed,
        **more,
    )
    control = common.model_copy(
        update={"max_num_batched_tokens": common.max_num_batched_tokens // 2}
    )
    todo = [] if done(control) else [control]
    todo += variants(common, preset_names, thresholds, done)
    if not todo:
        return
    stock, dtype = answer(common, windows, generated)
    for settings in todo:
        other, _ = answer(settings, windows, generated)
        results = compare(stock, other, [prompt_tokens] * prompts) | {"dtype": dtype}
        chosen = {
            "prompts": prompts,
            "prompt_tokens": prompt_tokens,
            "calibration_overlap": seen.get(settings.preset),
        }
        yield record_of("divergence", settings, results, chosen, files, dtype)


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


def _rows(record: Record) -> list[list[str]]:
    results: Any = record.results
    gap = results["gap_median_nats"]
    return [
        [
            *stored(record),
            "" if record.settings["preset"] == STOCK else after_and_recent(record),
            results["dtype"],
            ", ".join(f"{quartile:g}" for quartile in results["same_tokens_quartiles"]),
            f"{results['generated_tokens']}",
            f"{results['never_parted']:.0%}",
            "none parted" if gap is None else f"{gap:.3f}",
            f"{len(results['prompts'])}",
        ]
    ]


TABLES = {
    "divergence": Table(
        [
            *PRESET_HEADS,
            THRESHOLDS_HEAD,
            "dtype",
            "same tokens: quartiles",
            "of",
            "never part",
            "gap at the first difference, median (nats)",
            "prompts",
        ],
        _rows,
        "vllm-kvpca evaluate divergence",
    )
}
