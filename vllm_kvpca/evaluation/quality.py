"""What compression costs: stock against presets, teacher-forced through the served engine.

Both engines read the same windows of text and return the log-probability of every token and of
the likeliest ones (`prompt_logprobs`). All windows are in the engine at once and move in step,
`chunk` tokens at a time. The tokens of one chunk attend to each other raw, so a small chunk,
and compress_after = keep_recent = 0, is what "every token archived" comes closest to; what share
of the attended keys of the compressed layers really was archived is part of the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_kvpca.evaluation import engine, measures
from vllm_kvpca.evaluation.engine import EngineSettings
from vllm_kvpca.evaluation.progress import steps

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


def settings_for(
    model: str,
    windows: Sequence[Sequence[int]],
    chunk: int,
    preset: str = engine.STOCK,
    thresholds: tuple[int, int] = (512, 256),
    **more: Any,
) -> EngineSettings:
    """Engine settings with which all windows advance together, `chunk` tokens a step."""
    return EngineSettings(
        model=model,
        preset=preset,
        compress_after=thresholds[0],
        keep_recent=thresholds[1],
        max_model_len=max(map(len, windows)) + 1,
        max_num_seqs=len(windows),
        max_num_batched_tokens=len(windows) * chunk,
        chunk=chunk,
        **more,
    )


def score(settings: EngineSettings, windows: Sequence[Sequence[int]]) -> Scores:
    """Run one engine over the windows, in a process of its own.

    Raises:
        RuntimeError: the engine ran out of KV memory and computed tokens twice.
    """
    return engine.in_process(_score, settings, windows)


def _score(settings: EngineSettings, windows: Sequence[Sequence[int]]) -> Scores:
    llm = engine.start(settings, max_logprobs=RETURNED)
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        prompt_logprobs=RETURNED,
        flat_logprobs=True,
        detokenize=False,
    )
    chunks = engine.watch_chunks(llm)
    total = -(-max(map(len, windows)) // (settings.chunk or 1))
    with steps(
        f"{settings.preset} {settings.compress_after}/{settings.keep_recent}", total
    ) as step:
        outputs = engine.run(llm, windows, params, after_step=step)
    if any(sum(chunks[str(i)]) != len(window) for i, window in enumerate(windows)):
        raise RuntimeError("a window was computed twice: give the engine more KV memory.")
    ids, logprobs = zip(*(_arrays(output.prompt_logprobs) for output in outputs), strict=True)
    policy = engine.policy(llm)
    return Scores(
        target=np.stack([values[:, 0] for values in logprobs]),
        ids=np.stack([values[:, 1:] for values in ids]),
        logprobs=np.stack([values[:, 1:] for values in logprobs]),
        share=_share(chunks["0"], policy),
        align=policy.align if policy else 0,
        dtype=str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
    )


def _arrays(flat: Any) -> tuple[measures.Ints, measures.Floats]:
    """(tokens - 1, 1 + RETURNED) ids and log-probabilities; column 0 is the token that came."""
    width = 1 + RETURNED
    ids = np.asarray(flat.token_ids, np.int64).reshape(-1, width)
    return ids, np.asarray(flat.logprobs, np.float64).reshape(-1, width)


def _share(chunks: list[int], policy: Any) -> float:
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
