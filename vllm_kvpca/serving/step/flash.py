"""FlashAttention, as vLLM ships it: attention of prefilling sequences on a GPU."""

from __future__ import annotations

from functools import cache

import torch
from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.pages.step_plan import PrefillGroup


@cache
def flash_version(head_dim: int, soft_cap: bool) -> int:
    """The version that serves this head size here.

    Raises:
        UnsupportedError: there is none.
    """
    version = get_flash_attn_version(head_size=head_dim, requires_softcap=soft_cap)
    if version is None:
        raise UnsupportedError(
            f"KV compression needs FlashAttention for prefill, and vLLM has none for this GPU "
            f"and head size {head_dim}: serve this model without --kv-compression-preset."
        )
    return int(version)


def causal_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: PrefillGroup,
    softmax: Softmax,
    out: torch.Tensor,
) -> None:
    """Causal attention of packed sequences whose last queries and keys coincide.

    Args:
        query, out: (queries, heads, head_dim); key, value: (keys, kv_heads, head_dim).
    """
    scale, soft_cap = softmax
    flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        cu_seqlens_q=group.query_start,
        cu_seqlens_k=group.key_start,
        max_seqlen_q=group.max_new,
        max_seqlen_k=group.max_length,
        softmax_scale=scale,
        causal=True,
        softcap=soft_cap or 0.0,
        out=out,
        fa_version=flash_version(query.shape[-1], bool(soft_cap)),
    )
