"""After warm_up no step compiles a kernel: requests would wait for it.

Triton's own compiler is asked, for a GPU that is not there (see compiling.py).
"""

from __future__ import annotations

import pytest
import torch
from compiling import compile_in_subprocess
from kernel_cases import make_codec, make_plan, make_table

from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.table import kernels
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.step_plan import StepTokens, group_prefills

pytest.importorskip("triton")

HEADS, KV_HEADS, HEAD_DIM, RAW_BLOCK = 6, 2, 64, 40
POLICY = Policy(128, 64, 48)
STEPS = [([1], []), ([1] * 5, []), ([1] * 16, [7]), ([1] * 33, [40, 300]), ([], [64])]
"""(new tokens of decoding sequences, of prefilling ones)."""


def make_layer():
    from vllm_kvpca.ops.attend.decode import make_workspace
    from vllm_kvpca.ops.attend.kernel import AttendWorkspace

    torch.manual_seed(0)
    codec = make_codec("kv-mixed", HEAD_DIM, KV_HEADS, torch.bfloat16)
    key, value = torch.zeros(2, 400, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    decode = make_workspace(64, HEADS, KV_HEADS, HEAD_DIM, 400, torch.device("cpu"))
    plan = make_plan(codec, RAW_BLOCK, POLICY)
    return plan, codec, AttendWorkspace(decode, key, value, lambda *args: None)


def warm() -> None:
    from vllm_kvpca.serving.step.warm_up import compile_kernels

    plan, codec, workspace = make_layer()
    compile_kernels(plan, codec, HEADS, KV_HEADS, Softmax(1.0), workspace, 64, kernels())


def warm_then_steps() -> None:
    from vllm_kvpca.ops.attend.decode import make_chunks
    from vllm_kvpca.ops.table import make_step
    from vllm_kvpca.serving.step.run import run_step

    warm()
    plan, codec, workspace = make_layer()
    recent = torch.zeros(90, KV_HEADS, RAW_BLOCK, 2 * HEAD_DIM, dtype=torch.bfloat16)
    pages = torch.zeros(90, KV_HEADS, codec.layout.head_bytes, dtype=torch.uint8)
    for decodes, prompts in STEPS:
        new = torch.tensor([0, *decodes, *prompts], dtype=torch.int32)
        query_start, lengths = new.cumsum(0, dtype=torch.int32), new[1:] + 20
        table = make_table([9] * len(lengths))
        host = query_start.tolist(), lengths.tolist()
        rows = torch.zeros(int(query_start[-1]), HEADS + 2 * KV_HEADS, HEAD_DIM).bfloat16()
        query, key, value = rows.split([HEADS, KV_HEADS, KV_HEADS], 1)
        step = make_step(
            kernels(),
            plan,
            query_start,
            lengths,
            table,
            table,
            decodes=len(decodes),
            prefills=group_prefills(*host, len(decodes), 400, (query_start, lengths)),
            chunks=make_chunks(workspace.decode, 64),
        )
        tokens = StepTokens(query, key, value, torch.empty_like(query))
        run_step(step, tokens, LayerCache(recent, pages, codec), Softmax(1.0), kernels(), workspace)


def test_no_step_compiles_a_kernel_that_warm_up_has_not():
    first = compile_in_subprocess(__file__, "warm", 90)
    both = compile_in_subprocess(__file__, "warm_then_steps", 90)
    names = {kernel.name for kernel in first}
    assert {"rotate_kernel", "split_kernel", "merge_kernel", "chunks_kernel"} <= names
    assert len(both) > 2 * len(first)
    assert {(k.name, k.cubin_bytes, k.hash) for k in both} == {
        (k.name, k.cubin_bytes, k.hash) for k in first
    }
