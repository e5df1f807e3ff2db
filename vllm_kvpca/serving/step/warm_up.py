"""Compile the GPU kernels before the first request: a small step over caches of its own.

Triton compiles a kernel when it is first launched, a second or two each. CUDA graphs cover
decoding; steps that also prefill would make the first requests wait.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vllm_kvpca.ops.attend.decode import make_chunks
from vllm_kvpca.ops.attend.kernel import AttendWorkspace
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.ops.table import Ops, make_step
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens, group_prefills
from vllm_kvpca.serving.step.run import run_step

NEW_TOKENS = 8
BATCHES = (1, 64)
"""Decoding sequences of a step: the merge is compiled for few and for many."""
_done: set[Any] = set()


def compile_kernels(
    plan: LayerPlan,
    codec: LayerCodec,
    heads: int,
    kv_heads: int,
    softmax: Softmax,
    workspace: AttendWorkspace,
    max_sequences: int,
    ops: Ops,
) -> None:
    """Launch every kernel that a step may need once, for layers like this one.

    Args:
        plan: final. codec: the layer's; its bases are on the device.
        heads, kv_heads: query and KV heads on this rank.
        max_sequences: of a step.
    """
    bases = codec.k_basis is None, codec.v_basis is None
    shape = (heads, kv_heads, softmax.soft_cap is None, max_sequences)
    kind = (replace(plan, model=""), *bases, *shape)
    if kind in _done:
        return
    device, dim = workspace.key.device, plan.head_dim
    workspace = replace(workspace, causal_attention=lambda *args: None)
    recent = torch.zeros(2, kv_heads, plan.raw_block, 2 * dim, dtype=plan.dtype, device=device)
    pages = torch.zeros(2, kv_heads, plan.archive.head_bytes, dtype=torch.uint8, device=device)
    for batch in BATCHES:
        if batch <= max_sequences:
            step = _step(plan, batch, make_chunks(workspace.decode, max_sequences), ops, device)
            rows = (len(step.slots), heads + 2 * kv_heads, dim)
            qkv = torch.zeros(rows, dtype=plan.dtype, device=device)
            query, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
            tokens = StepTokens(query, key, value, torch.empty_like(query))
            run_step(step, tokens, LayerCache(recent, pages, codec), softmax, ops, workspace)
    _done.add(kind)


def _step(plan: LayerPlan, batch: int, chunks: Any, ops: Ops, device: torch.device) -> StepPlan:
    """`batch` sequences that decode their second token, and one that goes on with its prompt."""
    host = [*range(batch + 1), batch + NEW_TOKENS], [2] * batch + [2 * NEW_TOKENS]
    query_start, lengths = (torch.tensor(x, dtype=torch.int32, device=device) for x in host)
    rows = -(-2 * NEW_TOKENS // plan.raw_block)
    table = torch.ones(batch + 1, rows, dtype=torch.int32, device=device)
    prefills = group_prefills(*host, batch, 2 * NEW_TOKENS, (query_start, lengths))
    attending = {"decodes": batch, "prefills": prefills, "chunks": chunks}
    return make_step(ops, plan, query_start, lengths, table, table, **attending)
