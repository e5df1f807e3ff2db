"""The spread of K and V, against processes whose coding gain is known in closed form."""

import math

import pytest
import torch

from vllm_kvpca.calibration.collect import Moments, attention_shape, collect
from vllm_kvpca.calibration.report import coding_gain_db, spread

HEAD_DIM = 32


def moments_of(second: torch.Tensor, mean: torch.Tensor) -> Moments:
    """Of 10 tokens, one layer (index 4) and one KV head, K and V alike."""
    sums = {which: {4: second.double()[None] * 10} for which in "kv"}
    firsts = {which: {4: mean.double()[None] * 10} for which in "kv"}
    return Moments(sums, 10, firsts)


@pytest.mark.parametrize("rho", [0.5, 0.9])
def test_gain_of_a_first_order_process(rho: float):
    """Its autocorrelation matrix has the determinant (1 - rho^2)^(n-1) and a diagonal of ones."""
    distance = (torch.arange(HEAD_DIM)[:, None] - torch.arange(HEAD_DIM)).abs()
    rows = spread(moments_of(rho ** distance.double(), torch.zeros(HEAD_DIM)), [4])
    assert [(row["layer"], row["tensor"]) for row in rows] == [(4, "k"), (4, "v")]
    expected = -10 * (HEAD_DIM - 1) / HEAD_DIM * math.log10(1 - rho**2)
    assert rows[0]["coding_gain_db"] == pytest.approx(expected, abs=1e-9)
    assert rows[0]["channel_gain_db"] == pytest.approx(0, abs=1e-9)
    assert rows[0]["rms"] == 1 and rows[0]["mean_share"] == 0
    assert sum(rows[0]["spectrum"]) == pytest.approx(1, abs=1e-3)
    assert rows[0]["spectrum"] == sorted(rows[0]["spectrum"], reverse=True)


def test_gain_of_channels_apart_is_that_of_the_basis():
    energies = torch.logspace(0, 3, HEAD_DIM)
    row = spread(moments_of(torch.diag(energies), torch.zeros(HEAD_DIM)), [4])[1]
    assert row["channel_gain_db"] == pytest.approx(row["coding_gain_db"], abs=1e-6)
    assert row["condition"] == pytest.approx(1000, rel=1e-6)


def test_a_dead_channel_gives_no_infinity():
    energies = torch.ones(HEAD_DIM)
    energies[3] = 0
    gain = float(coding_gain_db(energies))
    assert gain == pytest.approx(120 / HEAD_DIM + 10 * math.log10(31 / 32) * 31 / 32, abs=0.01)


def test_share_of_the_mean_is_that_of_the_tokens(model):
    """A model fed one token at a time, over and over: all of V is mean, at every position."""
    shape = attention_shape(model)
    same = spread(collect(model, shape, ["k", "v"], [[5]] * 8), shape.layers)
    assert all(row["mean_share"] == pytest.approx(1, abs=1e-6) for row in same)
    several = spread(collect(model, shape, ["k", "v"], [list(range(64))]), shape.layers)
    assert all(row["mean_share"] < 0.5 for row in several if row["tensor"] == "v")
    assert [row["layer"] for row in several] == [0, 0, 1, 1, 2, 2]
