"""Figures from log-probabilities: pure functions of arrays, in nats."""

from __future__ import annotations

from math import comb, sqrt

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEAST = 1e-9
"""Probabilities below this are rounding errors of 1 minus a sum."""


def perplexity(logprobs: Floats) -> float:
    """exp of the mean negative log-probability of the tokens that really came."""
    return float(np.exp(-np.mean(logprobs)))


def perplexity_change(stock: Floats, other: Floats) -> float:
    """Relative change of the perplexity: 0.01 is one percent worse."""
    return float(np.exp(np.mean(stock) - np.mean(other)) - 1)


def bootstrap_change(
    stock: Floats, other: Floats, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of `perplexity_change`, by the paired percentile bootstrap.

    Windows are resampled whole, both engines alike: tokens of one window depend on each other
    (Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapters 8 and 13).

    Args:
        stock, other: (windows, tokens).
    """
    low, high = bootstrap_mean(stock.mean(1) - other.mean(1), seed, resamples, level)
    return float(np.expm1(low)), float(np.expm1(high))


def bootstrap_mean(
    values: Floats, seed: int, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """Confidence interval of the mean of independent values, by the percentile bootstrap."""
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(values[picks].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of "both are right equally often", by McNemar's exact test.

    Cases that both or neither got right say nothing about it; of the others each is a fair coin
    (McNemar, Psychometrika 12, 1947; exact: Dixon & Mood, JASA 41, 1946).

    Args:
        only_first, only_second: how many cases only one of them got right.
    """
    parted = only_first + only_second
    tail = sum(comb(parted, k) for k in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**parted)


def paired_difference(only_first: int, only_second: int, cases: int) -> tuple[float, float]:
    """95 % interval of the second's share of right cases minus the first's, of the same cases.

    Bonett & Price's adjusted Wald interval (J. Educational and Behavioral Statistics 37, 2012):
    unlike a bootstrap it does not shrink to a point where no case, or very few, tell them apart.
    """
    first, second = ((n + 1) / (cases + 2) for n in (only_first, only_second))
    error = 1.959964 * sqrt((first + second - (second - first) ** 2) / (cases + 2))
    return max(-1.0, second - first - error), min(1.0, second - first + error)


def kl_lower_bound(
    stock_ids: Ints, stock_logprobs: Floats, other_ids: Ints, other_logprobs: Floats
) -> Floats:
    """KL(stock || other) of each position, over stock's likeliest tokens and a bucket for the rest.

    An engine returns a few log-probabilities per position, not all. Merging outcomes can only
    lower the divergence (data processing inequality; Cover & Thomas, Elements of Information
    Theory, section 2.8), so this is a lower bound of the full KL. Tokens of stock that `other`
    did not return go to the bucket as well.

    Args:
        stock_ids, stock_logprobs: (positions, k), distinct tokens in each row.
        other_ids, other_logprobs: (positions, m), distinct tokens in each row; m > k leaves
            fewer tokens to the bucket.

    Returns:
        (positions,) nats.
    """
    same = stock_ids[:, :, None] == other_ids[:, None, :]
    found = same.any(2)
    q = np.exp(np.take_along_axis(other_logprobs, same.argmax(2), 1))
    p = np.exp(stock_logprobs)
    terms = np.where(found, p * (stock_logprobs - np.log(np.maximum(q, 1e-300))), 0.0)
    rest_p = np.maximum(1 - np.where(found, p, 0).sum(1), _LEAST)
    rest_q = np.maximum(1 - np.where(found, q, 0).sum(1), _LEAST)
    bound: Floats = terms.sum(1) + rest_p * np.log(rest_p / rest_q)
    return bound


def top1_agreement(stock_ids: Ints, other_ids: Ints) -> float:
    """Share of positions with the same likeliest token (column 0 of both)."""
    return float(np.mean(stock_ids[:, 0] == other_ids[:, 0]))
