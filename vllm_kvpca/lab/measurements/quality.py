"""What compression costs: stock against presets, teacher-forced through the served engine.

Both engines read the same windows of text (see `reading`) and return the log-probability of every
token and of the likeliest ones. What share of the attended keys of the compressed layers really
was archived is part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_kvpca.calibration import statistics as measures
from vllm_kvpca.lab import teacher_forced as reading
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.record import Record
from vllm_kvpca.pages.boundary import Policy

TOP = 20
"""Stock's likeliest tokens that the KL divergence is taken over, with one bucket for the rest."""
RETURNED = 64
"""Likeliest tokens that each engine returns: more than TOP, so that a token of stock's TOP that
fell behind in the other engine is still found."""


@dataclass(frozen=True)
class Scores:
    """What one engine says about the windows.

    Attributes:
        target: (windows, tokens - 1) log-probability of each token after the first, nats.
        ids, logprobs: (windows, tokens - 1, RETURNED) the likeliest tokens, best first.
        share: of attended keys that were archived; see measures.archived_share.
        align: tokens; step of the boundary, 0 in a stock engine.
        dtype: as resolved by the engine.
    """

    target: measures.Floats
    ids: measures.Ints
    logprobs: measures.Floats
    share: float
    align: int
    dtype: str


def score(settings: EngineSettings, windows: Sequence[Sequence[int]]) -> Scores:
    """Run one engine over windows of equal length; see reading.read."""
    read = reading.read(settings, windows, RETURNED)
    policy = read.policy
    return Scores(
        target=np.stack([values[:, 0] for values in read.logprobs]),
        ids=np.stack([values[:, 1:] for values in read.ids]),
        logprobs=np.stack([values[:, 1:] for values in read.logprobs]),
        share=archived_share(read.chunks[0], policy),
        align=policy.align if policy else 0,
        dtype=read.dtype,
    )


def archived_share(chunks: list[int], policy: Policy | None) -> float:
    """See measures.archived_share; 0 without a policy."""
    if policy is None:
        return 0.0
    return measures.archived_share(chunks, policy.compress_after, policy.keep_recent, policy.align)


def compare(stock: Scores, other: Scores, seed: int) -> dict[str, Any]:
    """The results of a record: `other` against `stock` on the same windows."""
    low, high = measures.bootstrap_change(stock.target, other.target, seed)
    kl = np.concatenate(
        [
            measures.kl_lower_bound(*window)
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
        "perplexity_stock": measures.perplexity(stock.target),
        "perplexity": measures.perplexity(other.target),
        "perplexity_change": measures.perplexity_change(stock.target, other.target),
        "perplexity_change_ci95": [low, high],
        "kl_lower_bound_mean_nats": float(kl.mean()),
        "kl_lower_bound_p99_nats": float(np.quantile(kl, 0.99)),
        "top1_agreement": measures.top1_agreement(
            stock.ids.reshape(-1, RETURNED), other.ids.reshape(-1, RETURNED)
        ),
        "archived_share_of_attended_keys": other.share,
        "predicted_tokens": int(stock.target.size),
        "boundary_step_tokens": other.align,
        "dtype": other.dtype,
    }


def put_beside(record: Record, others: Sequence[Record]) -> Record:
    """The record with "engine": what one of `others` says of the same preset, thresholds and
    windows, or None. Of several the one with the same dtype, else with the finest."""
    same = [o for o in others if o.kind == "quality" and _measured(o) == _measured(record)]
    order = [record.results["dtype"], "float16", "bfloat16"]
    found = min(same, key=lambda other: order.index(other.results["dtype"]), default=None)
    names = (
        "perplexity_change",
        "perplexity_change_ci95",
        "kl_lower_bound_mean_nats",
        "top1_agreement",
        "boundary_step_tokens",
        "dtype",
    )
    beside: dict[str, Any] | None = None
    if found is not None:
        beside = {name: found.results[name] for name in names} | {"commit": found.commit}
    return record.model_copy(update={"results": record.results | {"engine": beside}})


def _measured(record: Record) -> tuple[Any, ...]:
    names = ("preset", "compress_after", "keep_recent", "windows", "window_tokens", "chunk")
    chosen = [record.settings.get(name) for name in names]
    texts = sorted(text.sha256 for text in record.texts)
    return record.model_sha256, chosen, texts
