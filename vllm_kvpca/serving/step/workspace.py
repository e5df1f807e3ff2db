"""GPU memory that attention works in: allocated with the model, so that vLLM's memory profile
counts it, and shared by all layers of a shape in one engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from vllm_kvpca.ops.attend.decode import make_workspace
from vllm_kvpca.ops.attend.kernel import AttendWorkspace, CausalAttention
from vllm_kvpca.serving.step.archive_layer import ArchiveLayer, CompressedImpl
from vllm_kvpca.serving.step.plan import context_tokens


def workspace_for(
    context: Mapping[str, Any],
    impl: CompressedImpl,
    dtype: torch.dtype,
    device: torch.device,
    causal_attention: CausalAttention,
    key_bias: bool,
) -> AttendWorkspace:
    """The workspace of a layer: that of an earlier layer of the same shape, or a new one.

    Args:
        context: the engine's layers by name (static_forward_context).
        causal_attention: what serves prefill.
        key_bias: whether K is archived without its bias, in all layers.
    """
    shape = (impl.num_heads, impl.num_kv_heads, impl.head_size)
    for layer in context.values():
        if isinstance(layer, ArchiveLayer) and (*layer.shape, layer.codec.dtype) == (*shape, dtype):
            return layer.workspace
    sequences = impl.vllm_config.scheduler_config.max_num_seqs
    longest = context_tokens(impl.vllm_config)
    key, value = torch.empty(2, longest, *shape[1:], dtype=dtype, device=device)
    return AttendWorkspace(
        decode=make_workspace(sequences, *shape, longest, device, key_bias=key_bias),
        key=key,
        value=value,
        causal_attention=causal_attention,
    )
