"""The gather kernels against their torch references."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import FORMATS, make_codec, make_table, random_tokens, strided_cache

from vllm_kvpca.kernels import reference

kernel = pytest.importorskip("vllm_kvpca.kernels.gather", exc_type=ImportError)

RAW_BLOCK = 32
BLOCK = 48
RANGES = [(0, 1), (5, 21), (40, 57), (30, 30), (33, 96)]
LONG = [(24, 1024)]


def ranges(pairs, device):
    """begins, ends, and where each sequence goes: two rows stay free before the first."""
    begins, ends = torch.tensor(pairs, dtype=torch.int32).T.contiguous()
    counts = ends - begins
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int() + 2
    return tuple(x.to(device) for x in (begins, ends, offsets))


def outputs(total, heads, head_dim, dtype, device):
    """NaN-filled K and V, as strided views, for the kernel and for its reference."""
    shape = (total + 4, heads + 1, head_dim)
    return [torch.full(shape, float("nan"), dtype=dtype, device=device)[:, 1:] for _ in range(4)]


def assert_equal(actual, wanted, dtype):
    """Triton's interpreter truncates float32 to bfloat16: one unit in the last place there."""
    interpreted = actual.device.type == "cpu" and dtype == torch.bfloat16
    rtol = 2.0**-7 if interpreted else 0.0
    torch.testing.assert_close(actual, wanted, rtol=rtol, atol=0, equal_nan=True)


def check_gather(name, dtype, pairs, heads, head_dim, max_tokens, device):
    torch.manual_seed(3)
    codec = make_codec(name, head_dim, heads, dtype, device, BLOCK)
    table = make_table([-(-end // BLOCK) for _, end in pairs], device)
    blocks = int(table.max()) + 1
    pages = strided_cache(
        blocks, heads, codec.layout.head_bytes, dtype=torch.uint8, device=device, fill=0xFF
    )
    key, value = random_tokens(blocks * BLOCK, heads, head_dim, dtype, device)
    reference.archive(pages, key, value, torch.arange(blocks * BLOCK, device=device), codec)
    begins, ends, offsets = ranges(pairs, device)
    total = int((ends - begins).sum())
    k, v, wanted_k, wanted_v = outputs(total, heads, head_dim, dtype, device)
    where = (pages, table, begins, ends, offsets, max_tokens)
    reference.gather(*where, wanted_k, wanted_v, codec)
    kernel.gather(*where, k, v, codec)
    assert_equal(k, wanted_k, dtype)
    assert_equal(v, wanted_v, dtype)
    assert (
        k[:2].isnan().all() and k[total + 2 :].isnan().all() and not k[2 : total + 2].isnan().any()
    )


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_dim", [(3, 64), (1, 96), (2, 128), (1, 256)])
def test_archived_tokens_of_every_format(name, dtype, heads, head_dim, device):
    check_gather(name, dtype, RANGES, heads, head_dim, 63, device)


@pytest.mark.parametrize("max_tokens", [100, 1000])
def test_a_longer_sequence_than_announced_is_served(max_tokens, device):
    check_gather("k8v4", torch.float16, LONG, 4, 64, max_tokens, device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_dim", [(3, 64), (1, 96), (2, 128), (1, 256)])
@pytest.mark.parametrize("pairs", [RANGES, LONG])
def test_recent_tokens(pairs, dtype, heads, head_dim, device):
    torch.manual_seed(4)
    table = make_table([-(-end // RAW_BLOCK) for _, end in pairs], device)
    recent = strided_cache(
        int(table.max()) + 1, heads, RAW_BLOCK, 2 * head_dim, dtype=dtype, device=device
    )
    recent.copy_(torch.randn(recent.shape))
    begins, ends, offsets = ranges(pairs, device)
    total = int((ends - begins).sum())
    k, v, wanted_k, wanted_v = outputs(total, heads, head_dim, dtype, device)
    where = (recent, table, begins, ends, offsets, 100)
    reference.gather_recent(*where, wanted_k, wanted_v)
    kernel.gather_recent(*where, k, v)
    # Copies: equal even in the interpreter.
    torch.testing.assert_close(k, wanted_k, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(v, wanted_v, rtol=0, atol=0, equal_nan=True)


def test_expanded_tokens_give_the_attention_of_the_archive(device):
    """The contract with the caller: rotate the query, multiply the output by v_basis^T."""
    torch.manual_seed(5)
    codec = make_codec("v-rank-int8", 64, 1, torch.float16, device, BLOCK)
    key, value = torch.randn(2, 40, 1, 64, device=device).half()
    pages = torch.zeros(2, 1, codec.layout.head_bytes, dtype=torch.uint8, device=device)
    reference.archive(pages, key, value, torch.arange(BLOCK, BLOCK + 40, device=device), codec)
    table = torch.tensor([[1]], dtype=torch.int32, device=device)
    query = torch.randn(1, 1, 3, 64, device=device)
    lengths = torch.tensor([40], device=device)
    wanted = reference.attend_archive(query, pages, table, lengths, codec, 0.125)
    k, v = torch.empty(2, 40, 1, 64, device=device).half()
    kernel.gather(pages, table, *ranges([(0, 40)], device)[:2], lengths * 0, 40, k, v, codec)
    weights = torch.softmax(query[0, 0] @ k[:, 0].float().T * 0.125, -1)
    out = weights @ v[:, 0].float() @ codec.v_basis[0].T
    # fp16 rounds what attend_archive keeps in float32: 2^-11 of components of a few units.
    torch.testing.assert_close(out, wanted.out[0, 0], rtol=2e-3, atol=2e-3)
