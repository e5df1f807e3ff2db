"""GPU memory that attention works in: allocated with the model, so that vLLM's memory profile
counts it, and shared by all layers of a shape."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from vllm_kvpca.serving.step.device_step import DeviceWorkspace


def context_tokens(vllm_config: Any) -> int:
    """Room for expanded context: one sequence of the greatest length."""
    return int(vllm_config.model_config.max_model_len)


def workspace_for(impl: Any, dtype: torch.dtype, device: torch.device) -> DeviceWorkspace:
    """The workspace of a layer: `impl` is its KvpcaAttentionImpl."""
    return _workspace(
        impl.vllm_config.scheduler_config.max_num_seqs,
        impl.num_heads,
        impl.num_kv_heads,
        impl.head_size,
        impl.vllm_config.model_config.max_model_len,
        context_tokens(impl.vllm_config),
        dtype,
        device,
    )


@cache
def _workspace(
    sequences: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    max_model_len: int,
    context: int,
    dtype: torch.dtype,
    device: torch.device,
) -> DeviceWorkspace:
    # Triton is at home where there is a GPU; elsewhere it need not be installed.
    from vllm_kvpca.ops.attend.decode import make_workspace
    from vllm_kvpca.serving.step.device_step import DeviceWorkspace

    key, value = torch.empty(2, context, kv_heads, head_dim, dtype=dtype, device=device)
    return DeviceWorkspace(
        decode=make_workspace(sequences, heads, kv_heads, head_dim, max_model_len, device),
        key=key,
        value=value,
    )
