"""Compile the GPU kernels before the first request: a small step over caches of its own.

Triton compiles a kernel when it is first launched, a second or two each. CUDA graphs cover
decoding; steps that also prefill would make the first requests wait.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layout import raw_token_bytes
from vllm_kvpca.serving.step.device_batch import DeviceStep, group_prefills, on_device
from vllm_kvpca.serving.step.device_step import DeviceWorkspace, LayerCache, run_device_step
from vllm_kvpca.serving.step.run import StepTokens

NEW_TOKENS = 8
BATCHES = (1, 64)
"""Decoding sequences of a step: the merge is compiled for few and for many."""
_done: set[Any] = set()


def compile_kernels(
    codec: LayerCodec,
    raw_block: int,
    policy: Policy,
    heads: int,
    kv_heads: int,
    soft_cap: float | None,
    workspace: DeviceWorkspace,
) -> None:
    """Launch every kernel that a step may need once, for layers like this one.

    Args:
        codec: the layer's; its bases are on the device.
        raw_block: tokens of a recent block. heads: query heads.
    """
    bases = codec.k_basis is None, codec.v_basis is None
    kind = (codec.layout, *bases, codec.dtype, raw_block, policy, heads, kv_heads, bool(soft_cap))
    if kind in _done:
        return
    _done.add(kind)
    device = workspace.key.device
    layout = codec.layout
    shape = (2, kv_heads, raw_block, raw_token_bytes(layout.head_dim) // 2)
    recent = torch.zeros(shape, dtype=codec.dtype, device=device)
    pages = torch.zeros(2, kv_heads, layout.head_bytes, dtype=torch.uint8, device=device)
    for batch in BATCHES:
        if batch <= len(workspace.decode.spans):
            step = _step(batch, raw_block, policy, device)
            tokens = len(step.slots)
            qkv = torch.zeros(
                tokens, heads + 2 * kv_heads, layout.head_dim, dtype=codec.dtype, device=device
            )
            query, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
            run_device_step(
                step,
                StepTokens(query, key, value, torch.empty_like(query)),
                LayerCache(recent, pages, codec),
                workspace,
                lambda *args: None,
                1.0,
                soft_cap,
            )


def _step(batch: int, raw_block: int, policy: Policy, device: torch.device) -> DeviceStep:
    """`batch` sequences that decode their second token, and one that goes on with its prompt."""
    from vllm_kvpca.ops.starts.kernel import list_busy, starts

    new = [1] * batch + [NEW_TOKENS]
    lengths = [2] * batch + [2 * NEW_TOKENS]
    query_start = [0]
    for count in new:
        query_start.append(query_start[-1] + count)
    query_starts = torch.tensor(query_start, dtype=torch.int32, device=device)
    all_lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    rows = -(-2 * NEW_TOKENS // raw_block)
    table = torch.ones(batch + 1, rows, dtype=torch.int32, device=device)
    out = torch.empty_like(all_lengths)
    starts(query_starts, all_lengths, table, raw_block, policy, out)
    busy = torch.zeros(batch + 2, dtype=torch.int32, device=device)
    list_busy(out, all_lengths, policy, busy)
    groups = group_prefills(query_start, lengths, batch, 2 * NEW_TOKENS)
    return DeviceStep(
        policy=policy,
        decodes=batch,
        prefills=tuple(on_device(group, query_starts, all_lengths) for group in groups),
        query_start=query_starts,
        lengths=all_lengths,
        starts=out,
        busy=busy,
        slots=torch.zeros(query_start[-1], dtype=torch.int64, device=device),
        recent_table=table,
        archive_table=table,
    )
