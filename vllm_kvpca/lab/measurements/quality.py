"""What compression costs: stock against presets, teacher-forced through the served engine.

Both engines read the same windows of text (see `teacher_forced`) and return the log-probability
of every token and of the likeliest ones. What share of the attended keys of the compressed layers
really was archived is part of the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kvpca.calibration import statistics
from vllm_kvpca.lab import presets, teacher_forced, texts
from vllm_kvpca.lab.against_stock import (
    ENGINE,
    Done,
    Thresholds,
    nothing_done,
    overlaps,
    record_of,
    variants,
)
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import (
    PRESET_HEADS,
    THRESHOLDS_HEAD,
    Table,
    after_and_recent,
    change,
    one_row,
    stored,
)
from vllm_kvpca.lab.teacher_forced import archived_share

TOP = 20
"""Stock's likeliest tokens that the KL divergence is taken over, with one bucket for the rest."""
RETURNED = 64
"""Likeliest tokens that each engine returns: more than TOP, so that a token of stock's TOP that
fell behind in the other engine is still found."""


def run(
    model: str,
    preset_names: Sequence[str],
    text: Sequence[Path],
    tokens: int = 20_480,
    window: int = 2048,
    chunk: int = 64,
    thresholds: Sequence[Thresholds] = ((0, 0), (512, 256)),
    through: str = ENGINE,
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "quality": one for each preset and pair of thresholds.

    Args:
        tokens, window: tokens in all and per window; tokens // window windows are read.
        chunk: tokens of each window per step.
        through: "engine"; or "transformers" for load_preset_cache, which gives records of kind
            "quality-transformers" with the whole KL divergence.
        done: what to leave out; see against_stock.finished.
        more: further EngineSettings.
    """
    presets.check(preset_names, model, peers=through == ENGINE)
    files = texts.find_texts(text)
    seen = overlaps(preset_names, files)
    windows = texts.windows(texts.tokenizer_of(model), files, max(1, tokens // window), window)
    common = teacher_forced.settings_for(model, windows, chunk, seed=seed, **more)
    todo = variants(common, preset_names, thresholds, done)
    if not todo:
        return
    chosen = {"windows": len(windows), "window_tokens": window}
    kl = f"over stock's {TOP} likeliest tokens and one bucket for the rest: "
    for settings, results in zip(todo, _against_stock(todo, windows, through, seed), strict=True):
        used = chosen | {
            "kl": kl + "a lower bound of the full KL",
            "calibration_overlap": seen[settings.preset],
        }
        kind = "quality" if through == ENGINE else f"quality-{through}"
        yield record_of(kind, settings, results, used, files, results["dtype"])


def _against_stock(
    todo: Sequence[EngineSettings], windows: Sequence[Sequence[int]], through: str, seed: int
) -> Iterator[dict[str, Any]]:
    if through != ENGINE:
        # Imported late: it loads transformers' models, which no engine needs.
        from vllm_kvpca.lab.measurements import quality_transformers

        yield from quality_transformers.measure(todo, windows, todo[0].chunk or 1, seed)
        return
    stock = score(todo[0].model_copy(update={"preset": STOCK}), windows)
    for settings in todo:
        yield compare(stock, score(settings, windows), seed)


@dataclass(frozen=True)
class Scores:
    """What one engine says about the windows.

    Attributes:
        target: (windows, tokens - 1) log-probability of each token after the first, nats.
        ids, logprobs: (windows, tokens - 1, RETURNED) the likeliest tokens, best first.
        share: of attended keys that were archived; see teacher_forced.archived_share.
        align: tokens; step of the boundary, 0 in a stock engine.
        dtype: as resolved by the engine.
    """

    target: statistics.Floats
    ids: statistics.Ints
    logprobs: statistics.Floats
    share: float
    align: int
    dtype: str


def score(settings: EngineSettings, windows: Sequence[Sequence[int]]) -> Scores:
    """Run one engine over windows of equal length; see teacher_forced.read."""
    read = teacher_forced.read(settings, windows, RETURNED)
    policy = read.policy
    return Scores(
        target=np.stack([values[:, 0] for values in read.logprobs]),
        ids=np.stack([values[:, 1:] for values in read.ids]),
        logprobs=np.stack([values[:, 1:] for values in read.logprobs]),
        share=archived_share(read.chunks[0], policy),
        align=policy.align if policy else 0,
        dtype=read.dtype,
    )


def compare(stock: Scores, other: Scores, seed: int) -> dict[str, Any]:
    """The results of a record: `other` against `stock` on the same windows."""
    low, high = statistics.bootstrap_change(stock.target, other.target, seed)
    kl = np.concatenate(
        [
            statistics.kl_lower_bound(*window)
            for window in zip(
                stock.ids[..., :TOP],
                stock.logprobs[..., :TOP],
                other.ids,
                other.logprobs,
                strict=True,
            )
        ]
    )
    return {
        "perplexity_stock": statistics.perplexity(stock.target),
        "perplexity": statistics.perplexity(other.target),
        "perplexity_change": statistics.perplexity_change(stock.target, other.target),
        "perplexity_change_ci95": [low, high],
        "kl_lower_bound_mean_nats": float(kl.mean()),
        "kl_lower_bound_p99_nats": float(np.quantile(kl, 0.99)),
        "top1_agreement": statistics.top1_agreement(
            stock.ids.reshape(-1, RETURNED), other.ids.reshape(-1, RETURNED)
        ),
        "archived_share_of_attended_keys": other.share,
        "predicted_tokens": int(stock.target.size),
        "boundary_step_tokens": other.align,
        "dtype": other.dtype,
    }


def _row(record: Record) -> list[str]:
    results: Any = record.results
    return [
        *stored(record),
        after_and_recent(record),
        results["dtype"],
        f"{results['archived_share_of_attended_keys']:.0%}",
        change(results),
        f"{results['kl_lower_bound_mean_nats']:.5f}",
        f"{results['top1_agreement']:.2%}",
        f"{results['predicted_tokens']:,}",
    ]


TABLES = {
    "quality": Table(
        [
            *PRESET_HEADS,
            THRESHOLDS_HEAD,
            "dtype",
            "attended keys archived",
            "perplexity change (95 % interval)",
            "KL, lower bound (nats)",
            "same likeliest token",
            "tokens",
        ],
        one_row(_row),
        "vllm-kvpca evaluate quality",
    )
}
