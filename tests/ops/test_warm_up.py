"""After warm_up no step compiles a kernel: requests would wait for it.

Triton's own compiler is asked, for a GPU that is not there (see compiling.py).
"""

from __future__ import annotations

import pytest
import torch
from compiling import compile_in_subprocess
from kernel_cases import make_codec, make_table

from vllm_kvpca.pages.boundary import Policy

pytest.importorskip("triton")

HEADS, KV_HEADS, HEAD_DIM, RAW_BLOCK = 6, 2, 64, 40
POLICY = Policy(128, 64, 48)
STEPS = [([1], []), ([1] * 5, []), ([1] * 16, [7]), ([1] * 33, [40, 300]), ([], [64])]
"""(new tokens of decoding sequences, of prefilling ones)."""


def make_layer():
    from vllm_kvpca.ops.attend.decode import make_workspace
    from vllm_kvpca.serving.step.device_step import DeviceWorkspace

    torch.manual_seed(0)
    codec = make_codec("kv-mixed", HEAD_DIM, KV_HEADS, torch.bfloat16)
    key, value = torch.zeros(2, 400, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    decode = make_workspace(64, HEADS, KV_HEADS, HEAD_DIM, 400, torch.device("cpu"))
    return codec, DeviceWorkspace(decode, key, value)


def warm() -> None:
    from vllm_kvpca.serving.step.warm_up import compile_kernels

    codec, workspace = make_layer()
    compile_kernels(codec, RAW_BLOCK, POLICY, HEADS, KV_HEADS, None, workspace)


def warm_then_steps() -> None:
    from vllm_kvpca.ops.starts.kernel import list_busy, starts
    from vllm_kvpca.serving.step.device_batch import DeviceStep, group_prefills, on_device
    from vllm_kvpca.serving.step.device_step import LayerCache, run_device_step
    from vllm_kvpca.serving.step.run import StepTokens

    warm()
    codec, workspace = make_layer()
    recent = torch.zeros(90, KV_HEADS, RAW_BLOCK, 2 * HEAD_DIM, dtype=torch.bfloat16)
    pages = torch.zeros(90, KV_HEADS, codec.layout.head_bytes, dtype=torch.uint8)
    for decodes, prompts in STEPS:
        new = torch.tensor([0, *decodes, *prompts], dtype=torch.int32)
        query_start, lengths = new.cumsum(0, dtype=torch.int32), new[1:] + 20
        table = make_table([1] * len(lengths))
        out = torch.empty_like(lengths)
        starts(query_start, lengths, table, RAW_BLOCK, POLICY, out)
        busy = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        list_busy(out, lengths, POLICY, busy)
        host = query_start.tolist(), lengths.tolist()
        groups = group_prefills(*host, len(decodes), 400)
        tokens = torch.zeros(int(query_start[-1]), HEADS + 2 * KV_HEADS, HEAD_DIM).bfloat16()
        query, key, value = tokens.split([HEADS, KV_HEADS, KV_HEADS], 1)
        step = DeviceStep(
            policy=POLICY,
            decodes=len(decodes),
            prefills=tuple(on_device(group, query_start, lengths) for group in groups),
            query_start=query_start,
            lengths=lengths,
            starts=out,
            busy=busy,
            slots=torch.zeros(len(tokens), dtype=torch.int64),
            recent_table=table,
            archive_table=table,
        )
        step_tokens = StepTokens(query, key, value, torch.empty_like(query))
        cache = LayerCache(recent, pages, codec)
        run_device_step(step, step_tokens, cache, workspace, lambda *args: None, 1.0)


def test_no_step_compiles_a_kernel_that_warm_up_has_not():
    first = compile_in_subprocess(__file__, "warm", 90)
    both = compile_in_subprocess(__file__, "warm_then_steps", 90)
    names = {kernel.name for kernel in first}
    assert {"rotate_kernel", "split_kernel", "merge_kernel", "chunks_kernel"} <= names
    assert len(both) > 2 * len(first)
    assert {(k.name, k.cubin_bytes, k.hash) for k in both} == {
        (k.name, k.cubin_bytes, k.hash) for k in first
    }
