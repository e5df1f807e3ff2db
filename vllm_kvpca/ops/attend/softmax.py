"""Attention over a part of the keys, and merging the parts by their log-sum-exp.

Source of the merge: Dao et al., FlashAttention (arXiv:2205.14135), section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

MASKED = -1e30
"""Score of a masked key. Finite, so that a row without any key gets weight 0 and not NaN."""


class Softmax(NamedTuple):
    """How scores become weights.

    Attributes:
        scale: factor on the scores.
        soft_cap: scores become soft_cap * tanh(score / soft_cap), as Gemma 2 wants; None: do not.
    """

    scale: float
    soft_cap: float | None = None


class Partial(NamedTuple):
    """Result of attention over some of the keys.

    Attributes:
        out: (batch, heads, rows, width) float32, normalized over these keys.
        lse: (batch, heads, rows) float32, log of the sum of the exponentials.
    """

    out: torch.Tensor
    lse: torch.Tensor


def merge(a: Partial, b: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys."""
    lse = torch.logaddexp(a.lse, b.lse)
    weight_a = torch.exp(a.lse - lse).unsqueeze(-1)
    weight_b = torch.exp(b.lse - lse).unsqueeze(-1)
    return Partial(a.out * weight_a + b.out * weight_b, lse)


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    soft_cap: float | None = None,
) -> Partial:
    """Softmax attention over one set of keys.

    Args:
        query: (batch, heads, rows, dim) float32.
        key: (batch, heads, length, dim) float32.
        value: (batch, heads, length, width) float32.
        mask: added to the scores, broadcastable to (batch, heads, rows, length): 0 or MASKED, or
            what else belongs to a score.
        scale: factor on the scores.
        soft_cap: scores become soft_cap * tanh(score / soft_cap), as Gemma 2 wants.
    """
    if _fused(query, key, value, soft_cap):
        if mask is not None:
            mask = mask.expand(query.shape[0], mask.shape[1], query.shape[2], key.shape[2])
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
        return Partial(out, lse)
    weights = softmax_weights((query * scale) @ key.transpose(-1, -2), mask, soft_cap)
    return Partial(weights.out @ value, weights.lse)


def softmax_weights(
    scores: torch.Tensor, mask: torch.Tensor | None, soft_cap: float | None
) -> Partial:
    """Weights of the keys, (batch, heads, rows, length), with their log-sum-exp."""
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if mask is not None:
        scores = scores + mask
    lse = torch.logsumexp(scores, -1)
    return Partial(torch.exp(scores - lse.unsqueeze(-1)), lse)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    soft_cap: float | None = None,
) -> Partial:
    """Causal attention of (batch, heads, tokens, dim) float32 over itself."""
    if _fused(query, key, value, soft_cap):
        return Partial(
            *torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, key, value, is_causal=True, scale=scale
            )
        )
    tokens = query.shape[2]
    mask = torch.full((tokens, tokens), MASKED, device=query.device).triu(1)
    return partial_attention(query, key, value, mask, scale, soft_cap)


def _fused(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, soft_cap: float | None
) -> bool:
    """Whether torch's fused CPU kernel serves: it pays off for long queries only, knows no
    soft cap and wants K and V equally wide."""
    same_width = key.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and query.shape[2] > 32 and same_width and not soft_cap


def length_mask(
    lengths: torch.Tensor, start: int, size: int, skips: torch.Tensor | None = None
) -> torch.Tensor:
    """(batch, 1, 1, size) float32: 0 for positions start + j in [skip, length), else MASKED."""
    position = torch.arange(start, start + size, device=lengths.device)
    inside = position[None, :] < lengths[:, None]
    if skips is not None:
        inside &= position[None, :] >= skips[:, None]
    mask = torch.where(inside, 0.0, MASKED)
    return mask[:, None, None, :]
