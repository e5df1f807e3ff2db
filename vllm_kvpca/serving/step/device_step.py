"""Run one step of one layer on a GPU: store raw, archive, attend. No call waits for the device.

Decoding sequences attend with the decode kernel, in the archive's component space.
Prefilling sequences have many queries per key: their context is expanded once into a
workspace, in head space and followed by the new tokens, and FlashAttention does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vllm_kvpca.ops.archive.kernel import archive
from vllm_kvpca.ops.attend.decode import DecodeWorkspace, decode, plan_decode
from vllm_kvpca.ops.expand.kernel import gather
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.ops.store.kernel import store
from vllm_kvpca.serving.observe.times import timer
from vllm_kvpca.serving.step.device_batch import DevicePrefill, DeviceStep
from vllm_kvpca.serving.step.run import StepTokens

CausalAttention = Callable[..., None]
"""(query, key, value, query_start, key_start, max_query, max_key, scale, soft_cap, out):
causal attention of packed sequences whose last queries and keys coincide."""


@dataclass(frozen=True)
class DeviceWorkspace:
    """Memory that all layers of a shape share; allocated before vLLM profiles.

    Attributes:
        decode: partial results of the decode kernel.
        key, value: (tokens, kv_heads, head_dim) expanded context of prefilling sequences.
    """

    decode: DecodeWorkspace
    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache.

    Attributes:
        recent: (blocks, kv_heads, raw_block, 2 * head_dim) in the model's dtype.
        pages: (blocks, kv_heads, head_bytes) uint8.
    """

    recent: torch.Tensor
    pages: torch.Tensor
    codec: LayerCodec


def run_device_step(
    step: DeviceStep,
    tokens: StepTokens,
    cache: LayerCache,
    workspace: DeviceWorkspace,
    causal_attention: CausalAttention,
    scale: float,
    soft_cap: float | None = None,
) -> None:
    """Write the attention of all new tokens into `tokens.output`."""
    store(cache.recent, tokens.key, tokens.value, step.slots)
    started = timer.start(step, cache.recent.device)
    archive(
        cache.pages,
        cache.recent,
        tokens.key,
        tokens.value,
        step.query_start,
        step.lengths,
        step.starts,
        step.recent_table,
        step.archive_table,
        step.policy,
        cache.codec,
        step.busy,
        max_new=step.max_new,
    )
    timer.stop(started)
    if step.decodes:
        _decode(step, tokens, cache, workspace.decode, scale, soft_cap)
    for prefill in step.prefills:
        key, value = tokens.key[prefill.group.tokens], tokens.value[prefill.group.tokens]
        if prefill.group.context:
            key, value = workspace.key, workspace.value
            _expand_context(step, prefill, tokens, cache, workspace)
        causal_attention(
            tokens.query[prefill.group.tokens],
            key,
            value,
            prefill.query_start,
            prefill.key_start,
            prefill.group.max_new,
            prefill.group.max_length,
            scale,
            soft_cap,
            tokens.output[prefill.group.tokens],
        )


def _decode(
    step: DeviceStep,
    tokens: StepTokens,
    cache: LayerCache,
    workspace: DecodeWorkspace,
    scale: float,
    soft_cap: float | None,
) -> None:
    rows = slice(0, step.decodes)
    pages = cache.codec.layout, cache.recent.shape[2]
    if step.planned.get(id(workspace)) != pages:  # the first layer plans for others like it
        plan_decode(step.starts[rows], step.lengths[rows], *pages, workspace)
        step.planned[id(workspace)] = pages
    decode(
        tokens.query[rows],
        tokens.key[rows],
        tokens.value[rows],
        cache.recent,
        cache.pages,
        step.recent_table[rows],
        step.archive_table[rows],
        step.lengths[rows],
        cache.codec,
        scale,
        soft_cap,
        tokens.output[rows],
        workspace,
    )


def _expand_context(
    step: DeviceStep,
    prefill: DevicePrefill,
    tokens: StepTokens,
    cache: LayerCache,
    workspace: DeviceWorkspace,
) -> None:
    """Keys and values of whole sequences into the workspace, one after another."""
    rows = prefill.group.rows
    gather(
        cache.pages,
        cache.recent,
        tokens.key,
        tokens.value,
        step.query_start[rows.start : rows.stop + 1],
        step.lengths[rows],
        step.starts[rows],
        step.recent_table[rows],
        step.archive_table[rows],
        prefill.key_start,
        prefill.group.max_length,
        workspace.key,
        workspace.value,
        cache.codec,
    )
