"""Store in plain torch."""

from __future__ import annotations

import torch

from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens


def store(step: StepPlan, tokens: StepTokens, cache: LayerCache) -> None:
    """Write the step's raw K and V into recent pages."""
    store_slots(cache.recent, tokens.key, tokens.value, step.slots)


def store_slots(
    recent: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
) -> None:
    """Write raw tokens into recent pages.

    Args:
        recent: (blocks, kv_heads, raw_block, 2 * head_dim) in the model's dtype.
        key, value: (tokens, kv_heads, head_dim).
        slots: (tokens,) int64; one in the null block 0 (or below) is nowhere, because vLLM
            maps tokens without a raw block there.
    """
    keep = slots >= recent.shape[2]
    slots = slots[keep]
    block, offset = slots // recent.shape[2], slots % recent.shape[2]
    recent[block, :, offset] = torch.cat([key[keep], value[keep]], -1).to(recent.dtype)


def load_recent(recent: torch.Tensor, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw K and V, each (tokens, kv_heads, head_dim), of slots that are all valid."""
    both = recent[slots // recent.shape[2], :, slots % recent.shape[2]]
    key, value = both.chunk(2, -1)
    return key, value
