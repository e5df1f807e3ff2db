"""What is taken out of K is its bias after RoPE, and queries find it again."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_kvpca.codec.key_bias import FASTEST, RUN, KeyBias

HEADS = 3


def make(head_dim: int, theta: float = 1e6) -> KeyBias:
    generator = torch.Generator().manual_seed(head_dim)
    bias = 100 * torch.randn(HEADS, head_dim, generator=generator)
    half = head_dim // 2
    return KeyBias(bias, theta ** (-torch.arange(half) / half))


def rope(x: list[float], position: float, theta: float) -> list[float]:
    """RoPE as its paper writes it (Su et al., RoFormer, 2021, equation 15), pair by pair."""
    half = len(x) // 2
    out = [0.0] * len(x)
    for i in range(half):
        angle = position * theta ** (-i / half)
        out[i] = x[i] * math.cos(angle) - x[i + half] * math.sin(angle)
        out[i + half] = x[i + half] * math.cos(angle) + x[i] * math.sin(angle)
    return out


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("position", [0, 127, 128, 5000, 130_000])
def test_slow_pairs_lose_their_bias(head_dim, position):
    theta = 1e6
    one = make(head_dim, theta)
    left = torch.tensor([rope(head.tolist(), position, theta) for head in one.bias])
    left -= one.turned(torch.tensor([position]))[0]
    pairs = left.unflatten(-1, (2, -1)).norm(dim=1)
    size = one.bias.unflatten(-1, (2, -1)).norm(dim=1)
    slow = one.frequencies <= FASTEST
    assert 0 < slow.sum() < len(slow)
    # Half a run away from its middle the fastest of them has turned by FASTEST * RUN / 2.
    assert (pairs[:, slow] <= size[:, slow] * FASTEST * RUN / 2 * 1.01).all()
    torch.testing.assert_close(pairs[:, ~slow], size[:, ~slow], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_with_queries(head_dim):
    one = make(head_dim)
    positions = torch.tensor([3, 200, 40_000])
    queries = torch.randn(HEADS, 5, head_dim, generator=torch.Generator().manual_seed(1))
    wanted = torch.einsum("hqd,phd->hqp", queries.double(), one.turned(positions).double())
    found = (queries @ one.products()) @ one.angles(positions // RUN).T
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-2)


def test_tokens_of_a_run_share_what_is_taken_out():
    turned = make(64).turned(torch.arange(3 * RUN))
    assert (turned.unflatten(0, (3, RUN)) == turned[::RUN, None]).all()
    assert not torch.equal(turned[0], turned[RUN])
