"""Figures from log-probabilities, against definitions written out in plain Python."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpca.calibration import statistics


def distribution(rng, size):
    weights = rng.exponential(size=size) ** 3
    return weights / weights.sum()


def best(probabilities, count):
    """Ids and log-probabilities of the likeliest tokens, as an engine returns them."""
    ids = np.argsort(-probabilities)[:count]
    return ids[None], np.log(probabilities[ids])[None]


def test_perplexity_and_its_change():
    stock = np.log([[0.5, 0.25], [0.5, 0.25]])
    assert statistics.perplexity(stock) == pytest.approx(math.sqrt(8))
    worse = stock - math.log(1.01)
    assert statistics.perplexity_change(stock, worse) == pytest.approx(0.01)
    assert statistics.perplexity_change(stock, stock) == 0


def test_kl_equals_the_sum_over_buckets():
    rng = np.random.default_rng(1)
    p, q = distribution(rng, 40), distribution(rng, 40)
    bound = statistics.kl_lower_bound(*best(p, 5), *best(q, 40))[0]
    top = sorted(range(40), key=lambda i: -p[i])[:5]
    expected = sum(p[i] * math.log(p[i] / q[i]) for i in top)
    rest_p, rest_q = (1 - sum(x[i] for i in top) for x in (p, q))
    expected += rest_p * math.log(rest_p / rest_q)
    assert bound == pytest.approx(expected, rel=1e-9)


@given(seed=st.integers(0, 10_000), returned=st.integers(1, 30))
@settings(max_examples=100, deadline=None)
def test_kl_is_a_lower_bound_and_not_negative(seed, returned):
    rng = np.random.default_rng(seed)
    p, q = distribution(rng, 30), distribution(rng, 30)
    full = float(np.sum(p * np.log(p / q)))
    bound = statistics.kl_lower_bound(*best(p, 8), *best(q, returned))[0]
    # Rounding of probabilities near the floor that stands for zero.
    assert -1e-7 <= bound <= full + 1e-7


def test_kl_grows_with_the_tokens_that_are_returned_and_is_zero_for_equals():
    rng = np.random.default_rng(2)
    p, q = distribution(rng, 30), distribution(rng, 30)
    few, many = (statistics.kl_lower_bound(*best(p, 8), *best(q, n))[0] for n in (4, 30))
    assert few <= many
    assert statistics.kl_lower_bound(*best(p, 8), *best(p, 8))[0] == pytest.approx(0, abs=1e-9)


def test_top1_agreement_looks_at_the_first_column_alone():
    stock = np.array([[1, 2], [3, 4], [5, 6], [7, 8]])
    other = np.array([[1, 9], [4, 3], [5, 0], [7, 7]])
    assert statistics.top1_agreement(stock, other) == 0.75


def test_bootstrap_is_repeatable_holds_the_estimate_and_is_paired():
    rng = np.random.default_rng(3)
    stock = rng.normal(-3, 1, (10, 50))
    other = stock - 0.01 + rng.normal(0, 0.002, (10, 50))
    low, high = statistics.bootstrap_change(stock, other, seed=7)
    assert (low, high) == statistics.bootstrap_change(stock, other, seed=7)
    assert (low, high) != statistics.bootstrap_change(stock, other, seed=8)
    assert low < statistics.perplexity_change(stock, other) < high
    # Windows differ far more from each other than the engines do: unpaired it would be wide.
    assert high - low < 0.002


def test_bootstrap_interval_is_the_normal_one_where_that_holds():
    rng = np.random.default_rng(4)
    difference = rng.normal(0.01, 0.02, 400)
    other = np.zeros((400, 3)) - 2
    low, high = statistics.bootstrap_change(other + difference[:, None], other, seed=0)
    error = 1.96 * difference.std() / 20
    assert math.log1p(low) == pytest.approx(difference.mean() - error, abs=error / 10)
    assert math.log1p(high) == pytest.approx(difference.mean() + error, abs=error / 10)


def test_mcnemar_is_the_binomial_test_of_what_parts_them():
    # Fagerland, Lydersen & Laake, BMC Medical Research Methodology 13 (2013), table 1: 1 and 7.
    assert statistics.mcnemar(1, 7) == pytest.approx(0.0703125)
    assert statistics.mcnemar(7, 1) == statistics.mcnemar(1, 7)
    assert statistics.mcnemar(0, 0) == statistics.mcnemar(3, 3) == 1


def test_interval_of_a_paired_difference():
    low, high = statistics.paired_difference(1, 7, 21)
    # By hand: 2/23 and 8/23, difference 6/23, its error 1.96 sqrt((10/23 - 36/529) / 23).
    error = 1.959964 * math.sqrt((10 / 23 - 36 / 529) / 23)
    assert (low, high) == pytest.approx((6 / 23 - error, 6 / 23 + error))
    # Nothing parts them: still no certainty, and less of it in fewer cases.
    few, many = (statistics.paired_difference(0, 0, n) for n in (10, 1000))
    assert few[0] < many[0] < 0 < many[1] < few[1]


def test_the_interval_covers_what_is_true_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    only_first, only_second, cases = 0.03, 0.01, 164
    hits = 0
    for _ in range(2000):
        b, c, _ = rng.multinomial(cases, [only_first, only_second, 1 - only_first - only_second])
        low, high = statistics.paired_difference(b, c, cases)
        hits += low <= only_second - only_first <= high
    assert 0.93 < hits / 2000 < 0.99
