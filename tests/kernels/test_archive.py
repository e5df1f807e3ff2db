"""The archive kernels against their torch references."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    FORMATS,
    assert_same_codes,
    make_codec,
    make_table,
    random_tokens,
    strided_cache,
)

from vllm_kvpca.codec.policy import Policy
from vllm_kvpca.kernels import reference

kernel = pytest.importorskip("vllm_kvpca.kernels.archive", exc_type=ImportError)

RAW_BLOCK = 32
BLOCK = 48


def filled_recent(blocks, heads, head_dim, dtype, device):
    recent = strided_cache(blocks, heads, RAW_BLOCK, 2 * head_dim, dtype=dtype, device=device)
    key, value = random_tokens(blocks * RAW_BLOCK, heads, head_dim, dtype, device)
    slots = torch.arange(blocks * RAW_BLOCK, device=device)
    reference.store(recent, key, value, slots)
    return recent


def empty_pages(blocks, heads, codec, device):
    """0x77 everywhere: a byte nobody wrote shows, in both pages alike."""
    rest = codec.layout.head_bytes
    return [
        strided_cache(blocks, heads, rest, dtype=torch.uint8, device=device, fill=0x77)
        for _ in range(2)
    ]


def check_listed(name, dtype, old, new, heads, head_dim, device):
    """Archive `old` tokens of recent pages and `new` ones of this step; some slots are -1."""
    torch.manual_seed(old + new)
    codec = make_codec(name, head_dim, heads, dtype, device, BLOCK)
    recent = filled_recent(old // RAW_BLOCK + 2, heads, head_dim, dtype, device)
    key, value = random_tokens(new + 3, heads, head_dim, dtype, device)
    recent_slots = (torch.randperm(recent.shape[0] * RAW_BLOCK)[:old]).to(device)
    new_tokens = torch.randperm(new + 3)[:new].to(device)
    blocks = (old + new) // BLOCK + 3
    slots = (torch.randperm((blocks - 1) * BLOCK)[: old + new] + BLOCK).to(device)
    slots[1::7] = -1
    wanted, actual = empty_pages(blocks, heads, codec, device)
    reference.archive_work(wanted, recent, key, value, recent_slots, new_tokens, slots, codec)
    if old % 2:
        recent_slots, new_tokens, slots = recent_slots.int(), new_tokens.int(), slots.int()
    kernel.archive(actual, recent, key, value, recent_slots, new_tokens, slots, codec)
    assert (wanted != 0x77).any()
    assert_same_codes(actual, wanted, codec)


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_dim", [(3, 64), (1, 96), (2, 128), (1, 256)])
def test_codes_of_every_format(name, dtype, heads, head_dim, device):
    check_listed(name, dtype, 17, 16, heads, head_dim, device)


@pytest.mark.parametrize("name", ["k8v4", "kv-mixed"])
@pytest.mark.parametrize("old, new", [(1, 0), (0, 1), (16, 0), (0, 17), (63, 1), (937, 63)])
def test_any_number_of_tokens_from_both_sources(name, old, new, device):
    heads = 1 if old > 63 else 4  # the interpreter takes its time
    check_listed(name, torch.bfloat16, old, new, heads, 64, device)


@pytest.mark.parametrize("name", list(FORMATS))
def test_zero_vectors_have_scale_zero(name, device):
    codec = make_codec(name, 64, 1, torch.float16, device)
    zero = torch.zeros(3, 1, 64, device=device).half()
    recent = torch.zeros(1, 1, RAW_BLOCK, 128, device=device).half()
    none, index = torch.zeros(0, dtype=torch.int64), torch.arange(3)
    wanted, actual = empty_pages(1, 1, codec, device)
    args = (recent, zero, zero, none.to(device), index.to(device), index.to(device), codec)
    reference.archive_work(wanted, *args)
    kernel.archive(actual, *args)
    assert torch.equal(actual, wanted)


def test_ties_round_to_even(device):
    """Halves in every code: scale 1 (absmax 127) makes components of k + 1/2 exact ties."""
    codec = make_codec("k8v8", 64, 1, torch.float16, device)
    key = (torch.arange(64).float() - 32.5)[None, None].to(device).half()
    key[..., 0] = 127
    recent = torch.zeros(1, 1, RAW_BLOCK, 128, device=device).half()
    none, index = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    wanted, actual = empty_pages(1, 1, codec, device)
    args = (recent, key, key, none.to(device), index.to(device), index.to(device), codec)
    reference.archive_work(wanted, *args)
    kernel.archive(actual, *args)
    assert torch.equal(actual, wanted)
    codes = codec.layout.slice(actual, codec.layout.k_codes)[0, 0, 0].view(torch.int8)
    assert codes[1:5].tolist() == [-32, -30, -30, -28]


# compress_after 300 and keep_recent 40 at align 96: 301 tokens archive 192 at once.
POLICY = Policy(300, 40, 96)
DECODE_LENGTHS = [
    (0, 0),  # a padding row
    (1, 0),  # the first token
    (300, 0),  # one short of the threshold
    (301, 0),  # crosses it: 192 tokens
    (302, 192),  # nothing to do
    (328, 192),  # one step: [192, 288)
    (500, 0),  # 384 tokens: more than the grid has tiles
    (329, 300),  # a prefix hit archived more than the boundary
]


def decode_case(name, dtype, policy, lengths, heads, head_dim, device):
    torch.manual_seed(7)
    codec = make_codec(name, head_dim, heads, dtype, device, BLOCK)
    n = [length for length, _ in lengths]
    recent_table = make_table([-(-x // RAW_BLOCK) for x in n], device)
    archive_table = make_table([-(-policy.boundary(x) // BLOCK) for x in n], device)
    recent = filled_recent(int(recent_table.max()) + 1, heads, head_dim, dtype, device)
    key, value = random_tokens(len(n), heads, head_dim, dtype, device)
    lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
    wanted, actual = empty_pages(int(archive_table.max()) + 2, heads, codec, device)
    tables = (recent_table, archive_table, lengths[:, 0].contiguous(), lengths[:, 1].contiguous())
    return codec, wanted, actual, (recent, key, value, *tables, policy, codec)


@pytest.mark.parametrize("name", ["raw", "k8v4", "kv-mixed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_decode_step_archives_what_leaves_the_window(name, dtype, device):
    codec, wanted, actual, args = decode_case(name, dtype, POLICY, DECODE_LENGTHS, 2, 64, device)
    reference.archive_decode(wanted, *args)
    kernel.archive_decode(actual, *args)
    assert_same_codes(actual, wanted, codec)
    assert (actual[0] == 0x77).all(), "the null block was written"
    assert (wanted[1:] != 0x77).any()


def test_the_last_archived_token_may_be_the_new_one(device):
    """keep_recent 0: the token at length - 1 comes from K and V, not from a recent page."""
    policy = Policy(48, 0, 48)
    codec, wanted, actual, args = decode_case(
        "k8v8", torch.bfloat16, policy, [(48, 0), (96, 48), (144, 48), (49, 0)], 1, 64, device
    )
    recent, _, _, recent_table, _, lengths, _ = args[:7]
    for i, length in enumerate(lengths.tolist()):
        # Where the new token will be stored: must not be read.
        block = recent_table[i, (length - 1) // RAW_BLOCK]
        recent[block, :, (length - 1) % RAW_BLOCK] = float("nan")
    reference.archive_decode(wanted, *args)
    kernel.archive_decode(actual, *args)
    assert_same_codes(actual, wanted, codec)
    scales = codec.layout.scales(actual, codec.layout.k_scales)[:, 0]
    assert int((scales.view(torch.int16) != 0x7777).sum()) == 48 + 48 + 48 + 48


def test_a_decode_step_in_which_nothing_leaves(device):
    lengths = [(0, 0), (299, 0), (303, 192)]
    _, _, actual, args = decode_case("k8v4", torch.bfloat16, POLICY, lengths, 1, 64, device)
    kernel.archive_decode(actual, *args)
    assert (actual == 0x77).all()
