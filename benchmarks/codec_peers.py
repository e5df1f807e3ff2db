"""What other KV caches of vLLM 0.32 keep of K and V, emulated in torch.

Read off vLLM's sources: fp8 (csrc reshape_and_cache, scale 1), int8_per_token_head
(v1/attention/ops/triton_reshape_and_cache_flash.py), TurboQuant
(v1/attention/ops/triton_turboquant_{store,decode}.py, its centroids imported). A test compares each
with vLLM's own kernels under Triton's interpreter.
"""

from __future__ import annotations

from functools import cache

import torch

from vllm_kvpca.codec import hadamard_basis

FP8_MAX = 448.0


def fp8(x: torch.Tensor) -> torch.Tensor:
    """e4m3, scale 1, saturating."""
    return x.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype)


def int8_per_token_head(x: torch.Tensor) -> torch.Tensor:
    """int8 with one float32 scale per token and head, rounded half away from zero."""
    scale = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-6)
    q = x * (1 / scale)
    q = torch.where(q >= 0, q + 0.5, q - 0.5).clamp(-128, 127).trunc()
    return q * scale


def turboquant_k4(k: torch.Tensor) -> torch.Tensor:
    """Hadamard, 16 Lloyd-Max levels of the unit vector, norm in float16, norm correction."""
    size = k.shape[-1]
    rotation = hadamard_basis(size).to(k.device)
    table = centroids(size).to(k.device)
    norm = k.norm(dim=-1, keepdim=True)
    y = (k / (norm + 1e-8)) @ rotation
    # Kernel: a value at a midpoint goes up, hence right=True.
    c = table[torch.bucketize(y, (table[:-1] + table[1:]) / 2, right=True)]
    c = c / (c.square().sum(-1, keepdim=True) + 1e-16).sqrt()
    return (c @ rotation) * norm.half().float()


def turboquant_v4(v: torch.Tensor) -> torch.Tensor:
    """16 uniform steps from least to largest; step and least in float16."""
    low = v.amin(-1, keepdim=True)
    step = ((v.amax(-1, keepdim=True) - low) / 15).clamp_min(1e-8)
    q = ((v - low) / step + 0.5).trunc().clamp(0, 15)
    return q * step.half().float() + low.half().float()


@cache
def centroids(size: int) -> torch.Tensor:
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids

    return get_centroids(size, 4)


PEERS = {
    "fp8": (fp8, lambda size: size),
    "int8-token-head": (int8_per_token_head, lambda size: size + 4),
    "turboquant-k4": (turboquant_k4, lambda size: size // 2 + 2),
    "turboquant-v4": (turboquant_v4, lambda size: size // 2 + 4),
}
"""Name to (function, bytes per token and head)."""
