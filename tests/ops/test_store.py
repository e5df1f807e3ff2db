"""The store kernel against its torch reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import random_tokens, strided_cache

from vllm_kvpca.ops import reference

kernel = pytest.importorskip("vllm_kvpca.ops.store.kernel", exc_type=ImportError)

RAW_BLOCK = 32


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
    reference.store(wanted, key, value, slots)
    kernel.store(actual, key, value, slots.int() if tokens % 2 else slots)
    assert torch.equal(actual, wanted)


@pytest.mark.parametrize("slot", [-1, 0, RAW_BLOCK - 1])
def test_slots_of_no_block_leave_the_cache_untouched(slot, device):
    """vLLM's slots of tokens without a raw block lie in the null block; the planner's are -1."""
    recent = torch.full((2, 1, RAW_BLOCK, 128), float("nan"), device=device).half()
    key, value = random_tokens(5, 1, 64, torch.float16, device)
    kernel.store(recent, key, value, torch.full((5,), slot, device=device))
    reference.store(recent, key, value, torch.full((5,), slot, device=device))
    assert recent.isnan().all()


def test_the_first_slot_after_the_null_block_is_written(device):
    recent = torch.full((2, 1, RAW_BLOCK, 128), float("nan"), device=device).half()
    key, value = random_tokens(1, 1, 64, torch.float16, device)
    kernel.store(recent, key, value, torch.full((1,), RAW_BLOCK, device=device))
    assert torch.equal(recent[1, :, 0], torch.cat([key[0], value[0]], -1))


def test_no_tokens(device):
    recent = torch.zeros(2, 1, RAW_BLOCK, 128, device=device).half()
    none = torch.zeros(0, 1, 64, device=device).half()
    kernel.store(recent, none, none, torch.zeros(0, dtype=torch.int64, device=device))


def test_a_transposed_input_is_refused(device):
    recent = torch.zeros(2, 1, RAW_BLOCK, 128, device=device).half()
    key = torch.zeros(64, 1, 5, device=device).half().permute(2, 1, 0)
    with pytest.raises(ValueError, match="last dimension of key"):
        kernel.store(recent, key, key, torch.zeros(5, dtype=torch.int64, device=device))
