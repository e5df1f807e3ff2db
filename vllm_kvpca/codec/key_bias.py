"""K's bias, taken out of K before it is archived and given back where K is read.

Some models add a bias to K that is far larger than what a token adds (Qwen2, Qwen2.5). After RoPE
K is R_p W x + R_p b, and R_p b is known without storing a bit of it. It is largest in the pairs of
channels that RoPE turns slowest, so the position need not be exact: all tokens of a run share that
of its middle, and pairs that turn too fast for that keep their bias.

Whatever is taken out is given back exactly, at the same positions. A wrong bias or a wrong
frequency costs bits, never correctness.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

RUN = 128
"""Tokens that share a position. Kernels read tiles that divide it."""
FASTEST = 0.1 / RUN
"""Radians per token: within a run such a pair turns by 0.05 either way."""


@dataclass(frozen=True)
class KeyBias:
    """One layer's bias, for the KV heads at hand.

    RoPE turns the pairs (channel i, channel i + head_dim / 2).

    Attributes:
        bias: (kv_heads, head_dim) float32, before RoPE.
        frequencies: (head_dim / 2,) float32, radians per token of each pair.
    """

    bias: torch.Tensor
    frequencies: torch.Tensor

    def to(self, device: torch.device | str) -> KeyBias:
        return KeyBias(self.bias.to(device), self.frequencies.to(device))

    @property
    def slow(self) -> torch.Tensor:
        """(kv_heads, head_dim): the bias of the pairs that turn slowly, 0 for the others."""
        return self.bias * (self.frequencies <= FASTEST).repeat(2)

    def angles(self, runs: torch.Tensor) -> torch.Tensor:
        """Cosines, then sines of every pair at the middle of runs.

        Args:
            runs: (n,) indices of runs, any integer dtype.

        Returns:
            (n, head_dim) float32.
        """
        middle = runs.double()[:, None] * RUN + RUN / 2
        angle = middle * self.frequencies.double()
        return torch.cat([angle.cos(), angle.sin()], -1).float()

    def turned(self, positions: torch.Tensor) -> torch.Tensor:
        """What is taken out of K, (tokens, kv_heads, head_dim) float32.

        Args:
            positions: (tokens,) of the tokens.
        """
        runs, which = torch.unique(positions // RUN, return_inverse=True)
        cos, sin = self.angles(runs)[:, None].chunk(2, -1)
        first, second = self.slow.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
        return turned[which]

    def products(self) -> torch.Tensor:
        """(kv_heads, head_dim, head_dim) M with q . turned(p) = (q M) . angles(p // RUN): a query
        is multiplied once, and the angles of a run serve all heads."""
        first, second = self.slow.chunk(2, -1)
        top = torch.cat([first.diag_embed(), -second.diag_embed()], -1)
        bottom = torch.cat([second.diag_embed(), first.diag_embed()], -1)
        return torch.cat([top, bottom], -2)
