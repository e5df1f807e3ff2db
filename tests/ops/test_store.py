"""The store kernel against its torch reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    make_codec,
    make_plan,
    plan_step,
    random_tokens,
    step_tensors,
    strided_cache,
)

from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.store import reference
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.step_plan import StepTokens

kernel = pytest.importorskip("vllm_kvpca.ops.store.kernel", exc_type=ImportError)

RAW_BLOCK = 32


def store(op, recent, key, value, slots):
    """One op with a step of one sequence, whose tokens go to these slots."""
    head_dim, device = key.shape[2], key.device
    codec = make_codec("raw", head_dim, key.shape[1], key.dtype, device)
    plan = make_plan(codec, RAW_BLOCK, Policy(0, 0, 1))
    table = torch.zeros(1, 1, dtype=torch.int32, device=device)
    step = plan_step(plan, step_tensors([(0, len(key), 0)], device), table, table, slots)
    pages = torch.zeros(1, 1, codec.layout.head_bytes, dtype=torch.uint8, device=device)
    op.store(step, StepTokens(key, key, value, key), LayerCache(recent, pages, codec))


@pytest.mark.parametrize("tokens", [1, 16, 17, 63, 1000])
@pytest.mark.parametrize("heads, head_dim", [(1, 256), (2, 96), (3, 64), (4, 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tokens_reach_their_slots_and_nothing_else_changes(tokens, heads, head_dim, dtype, device):
    torch.manual_seed(tokens)
    key, value = random_tokens(tokens, heads, head_dim, dtype, device)
    blocks = tokens // RAW_BLOCK + 3
    slots = (torch.randperm((blocks - 1) * RAW_BLOCK)[:tokens] + RAW_BLOCK).to(device)
    slots[::5] = -1
    slots[1::5] = slots[1::5] % RAW_BLOCK  # the null block
    wanted, actual = (
        strided_cache(blocks, heads, RAW_BLOCK, 2 * head_dim, dtype=dtype, device=device, fill=7)
        for _ in range(2)
    )
    store(reference, wanted, key, value, slots)
    store(kernel, actual, key, value, slots.int() if tokens % 2 else slots)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize("slot", [-1, 0, RAW_BLOCK - 1])
def test_slots_of_no_block_leave_the_cache_untouched(slot, device):
    """vLLM's slots of tokens without a raw block lie in the null block; the planner's are -1."""
    recent = torch.full((2, 1, RAW_BLOCK, 128), float("nan"), device=device).half()
    key, value = random_tokens(5, 1, 64, torch.float16, device)
    store(kernel, recent, key, value, torch.full((5,), slot, device=device))
    store(reference, recent, key, value, torch.full((5,), slot, device=device))
    assert recent.isnan().all()


def test_the_first_slot_after_the_null_block_is_written(device):
    recent = torch.full((2, 1, RAW_BLOCK, 128), float("nan"), device=device).half()
    key, value = random_tokens(1, 1, 64, torch.float16, device)
    store(kernel, recent, key, value, torch.full((1,), RAW_BLOCK, device=device))
    assert torch.equal(recent[1, :, 0], torch.cat([key[0], value[0]], -1))


def test_no_tokens(device):
    recent = torch.zeros(2, 1, RAW_BLOCK, 128, device=device).half()
    none = torch.zeros(0, 1, 64, device=device).half()
    store(kernel, recent, none, none, torch.zeros(0, dtype=torch.int64, device=device))


def test_a_transposed_input_is_refused(device):
    recent = torch.zeros(2, 1, RAW_BLOCK, 128, device=device).half()
    key = torch.zeros(64, 1, 5, device=device).half().permute(2, 1, 0)
    with pytest.raises(ValueError, match="last dimension of key"):
        store(kernel, recent, key, key, torch.zeros(5, dtype=torch.int64, device=device))
