"""Attend on a GPU: decoding sequences by the decode kernel, prefilling ones by FlashAttention.

Decoding sequences attend in the archive's component space. Prefilling sequences have many queries
per key: their context is expanded once into a workspace, in head space and followed by the new
tokens, and a dense causal attention does the rest. No call waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_kvpca.ops.attend.decode import DecodeWorkspace, decode
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.expand.kernel import expand
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.pages.step_plan import PrefillGroup, StepPlan, StepTokens

CausalAttention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, PrefillGroup, Softmax, torch.Tensor], None
]
"""(query, key, value, group, softmax, out): causal attention of a group's packed sequences, whose
last queries and keys coincide."""


@dataclass(frozen=True)
class AttendWorkspace:
    """Memory that layers of a shape share, and what serves their prefill.

    Attributes:
        decode: partial results of the decode kernel.
        key, value: (tokens, kv_heads, head_dim) expanded context of prefilling sequences.
    """

    decode: DecodeWorkspace
    key: torch.Tensor
    value: torch.Tensor
    causal_attention: CausalAttention


def attend(
    step: StepPlan,
    tokens: StepTokens,
    cache: LayerCache,
    softmax: Softmax,
    workspace: AttendWorkspace,
) -> None:
    """Attention of all new tokens, into `tokens.output`; see `reference.attend`."""
    decode(step, tokens, cache, softmax, workspace.decode)
    for group in step.prefills:
        key, value = tokens.key[group.rows], tokens.value[group.rows]
        if group.context:
            key, value = workspace.key, workspace.value
            expand(step, group, tokens, cache, key, value)
        query, output = tokens.query[group.rows], tokens.output[group.rows]
        workspace.causal_attention(query, key, value, group, softmax, output)
