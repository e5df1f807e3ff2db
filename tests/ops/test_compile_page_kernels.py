"""Starts, store, archive and expand compile for the GPUs we name; see compiling.py."""

from __future__ import annotations

import pytest
import torch
from compiling import CAPABILITIES, compile_in_subprocess
from kernel_cases import make_codec, make_plan, make_table, plan_step, random_tokens, step_tensors

from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.step_plan import PrefillGroup, StepTokens

pytest.importorskip("triton")

Shapes = list[tuple[str, int, torch.dtype]]

SHAPES: Shapes = [
    ("kv-mixed", 96, torch.bfloat16),
    ("plain-mixed", 64, torch.float16),
]
"""Every kind of band, with and without a basis, in both dtypes."""
MORE_SHAPES: Shapes = [
    ("v-mixed", 256, torch.bfloat16),  # the most registers and shared memory
    ("k8v4", 128, torch.bfloat16),
    ("kb-mixed", 128, torch.bfloat16),  # K without its bias
]


def launches() -> None:
    launch(SHAPES)


def more_launches() -> None:
    launch(MORE_SHAPES)


def launch(shapes: Shapes) -> None:
    """Every kernel, with small tensors."""
    from vllm_kvpca.ops.archive.kernel import archive
    from vllm_kvpca.ops.expand.kernel import expand
    from vllm_kvpca.ops.locate.kernel import locate
    from vllm_kvpca.ops.store.kernel import store

    heads, policy = 2, Policy(128, 64, 48)
    for name, head_dim, dtype in shapes:
        codec = make_codec(name, head_dim, heads, dtype)
        pages = torch.zeros(4, heads, codec.layout.head_bytes, dtype=torch.uint8)
        recent = torch.zeros(4, heads, 32, 2 * head_dim, dtype=dtype)
        key, value = random_tokens(8, heads, head_dim, dtype)
        where = step_tensors([(5, 3, 0), (7, 5, 4)])
        tables = make_table([2, 1]), make_table([1, 2])
        step = plan_step(make_plan(codec, 32, policy), where, *tables, torch.arange(8))
        locate(*where[:2], tables[0], step.layer, step.starts, step.busy)
        tokens, cache = StepTokens(key, key, value, key), LayerCache(recent, pages, codec)
        store(step, tokens, cache)
        archive(step, tokens, cache)
        out_k, out_v = torch.zeros(2, 20, heads, head_dim, dtype=dtype)
        start = step.starts
        group = PrefillGroup(slice(0, 2), slice(0, 8), 5, 12, True, start, start)
        expand(step, group, tokens, cache, out_k, out_v)


@pytest.mark.parametrize(
    "function, capability",
    [*(("launches", capability) for capability in CAPABILITIES), ("more_launches", 90)],
)
def test_kernels_compile(function, capability):
    names = {kernel.name for kernel in compile_in_subprocess(__file__, function, capability)}
    assert names == {
        "_starts",
        "_list_busy",
        "_store_kernel",
        "_archive_kernel",
        "_expand_archive_kernel",
        "_expand_raw_kernel",
    }
