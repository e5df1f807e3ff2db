"""The archive kernel against its torch reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    FORMATS,
    assert_same_codes,
    busy_list,
    filled_recent,
    make_codec,
    make_table,
    random_tokens,
    step_tensors,
    strided_cache,
)

from vllm_kvpca.ops import reference
from vllm_kvpca.pages.boundary import Policy

kernel = pytest.importorskip("vllm_kvpca.ops.archive.kernel", exc_type=ImportError)
expand = pytest.importorskip("vllm_kvpca.ops.expand.kernel", exc_type=ImportError)

RAW_BLOCK = 32
BLOCK = 48
EVERYTHING = Policy(0, 0, 1)
"""Every token is archived at once."""
POLICY = Policy(300, 40, 96)
"""301 tokens archive 192 at once."""


def empty_pages(blocks, heads, codec, device):
    """0x77 everywhere: a byte nobody wrote shows, in both pages alike."""
    rest = codec.layout.head_bytes
    return [
        strided_cache(blocks, heads, rest, dtype=torch.uint8, device=device, fill=0x77)
        for _ in range(2)
    ]


def make_case(name, dtype, policy, sequences, heads, head_dim, device):
    """Codec, pages for the reference and for the kernel, and the arguments after pages."""
    torch.manual_seed(7)
    codec = make_codec(name, head_dim, heads, dtype, device, BLOCK)
    query_start, lengths, starts = step_tensors(sequences, device)
    n = lengths.tolist()
    recent_table = make_table([-(-x // RAW_BLOCK) for x in n], device)
    archive_table = make_table([-(-policy.boundary(x) // BLOCK) for x in n], device)
    blocks = int(recent_table.max()) + 1
    recent = filled_recent(blocks, heads, RAW_BLOCK, head_dim, dtype, device)
    tokens = random_tokens(max(1, int(query_start[-1])), heads, head_dim, dtype, device)
    wanted, actual = empty_pages(int(archive_table.max()) + 2, heads, codec, device)
    step = (query_start, lengths, starts, recent_table, archive_table)
    return codec, wanted, actual, (recent, *tokens, *step, policy, codec)


def archive(pages, args, max_new=1):
    """The kernel with the arguments of its reference."""
    lengths, starts, policy = args[4], args[5], args[8]
    kernel.archive(pages, *args, busy_list(starts, lengths, policy), max_new=max_new)


def check(name, dtype, policy, sequences, heads, head_dim, device, max_new=None):
    """Kernel and reference write the same; returns the kernel's pages."""
    codec, wanted, actual, args = make_case(name, dtype, policy, sequences, heads, head_dim, device)
    if max_new is None:
        max_new = max(new for _, new, _ in sequences)
    reference.archive_step(wanted, *args, max_new=max_new)
    archive(actual, args, max_new)
    assert_same_codes(actual, wanted, codec)
    assert (actual[0] == 0x77).all(), "the null block was written"
    assert (wanted[1:] != 0x77).any()
    return codec, actual


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_dim", [(3, 64), (1, 96), (2, 128), (1, 256)])
def test_codes_of_every_format(name, dtype, heads, head_dim, device):
    """17 old and 16 new tokens in one tile and a bit."""
    check(name, dtype, EVERYTHING, [(20, 16, 3)], heads, head_dim, device)


@pytest.mark.parametrize("name", ["k8v4", "kv-mixed"])
@pytest.mark.parametrize("old, new", [(1, 0), (0, 1), (16, 0), (0, 17), (63, 1), (337, 63)])
def test_any_number_of_tokens_from_both_sources(name, old, new, device):
    heads = 1 if old > 63 else 4  # the interpreter takes its time
    check(name, torch.bfloat16, EVERYTHING, [(old, new, 0)], heads, 64, device)


DECODES = [
    (0, 0, 0),  # a padding row
    (0, 1, 0),  # the first token
    (299, 1, 0),  # one short of the threshold
    (300, 1, 0),  # crosses it: 192 tokens
    (301, 1, 192),  # nothing to do
    (327, 1, 192),  # one step: [192, 288)
    (499, 1, 0),  # 384 tokens: more than the grid has tiles
    (328, 1, 300),  # a prefix hit archived more than the boundary
    (0, 0, 0),
]
PREFILLS = [
    (0, 340, 0),  # a prompt: [0, 288), all of it new
    (0, 300, 0),  # one that stays raw
    (250, 200, 0),  # the crossing, from both sources
    (310, 3, 192),  # nothing to do
    (400, 90, 400),  # a prefix hit archived more than the boundary: [400, 384) is empty
    (400, 140, 400),  # and here [400, 480), all of it new
]


@pytest.mark.parametrize(
    "name, dtype", [("raw", torch.bfloat16), ("k8v4", torch.float16), ("kv-mixed", torch.bfloat16)]
)
@pytest.mark.parametrize("sequences", [DECODES, DECODES[4:7] + PREFILLS], ids=["decode", "mixed"])
def test_a_step_archives_what_leaves_the_window(name, dtype, sequences, device):
    check(name, dtype, POLICY, sequences, 1, 64, device)


@pytest.mark.parametrize("max_new", [1, 40, 4000])
def test_the_grid_does_not_limit_the_work(max_new, device):
    check("k8v4", torch.float16, EVERYTHING, [(0, 300, 0), (250, 1, 2)], 1, 64, device, max_new)


@pytest.mark.parametrize("table", ["recent", "archive"])
def test_tokens_of_the_null_block_are_passed_over(table, device):
    """Sources in the null block are NaN here, and targets would show in page 0."""
    sequences = [(96, 30, 0), (40, 1, 0)]
    codec, wanted, actual, args = make_case(
        "k8v4", torch.bfloat16, EVERYTHING, sequences, 1, 64, device
    )
    args[6 if table == "recent" else 7][:, 1] = 0
    reference.archive_step(wanted, *args, max_new=30)
    archive(actual, args, 30)
    assert_same_codes(actual, wanted, codec)
    assert (actual[0] == 0x77).all()
    scales = codec.layout.scales(actual, codec.layout.k_scales)
    assert scales.isfinite().all()
    skipped = 32 + 8 if table == "recent" else 48
    assert int((scales.view(torch.int16) != 0x7777).sum()) == 126 + 41 - skipped


def test_the_last_archived_token_may_be_the_new_one(device):
    """keep_recent 0: the token at length - 1 comes from K and V, not from a recent page."""
    policy = Policy(48, 0, 48)
    sequences = [(47, 1, 0), (95, 1, 48), (143, 1, 96), (48, 1, 0)]
    codec, wanted, actual, args = make_case(
        "k8v8", torch.bfloat16, policy, sequences, 1, 64, device
    )
    recent, recent_table = args[0], args[6]
    for i, (computed, _, _) in enumerate(sequences):
        # Where the new token will be stored: must not be read.
        recent[recent_table[i, computed // RAW_BLOCK], :, computed % RAW_BLOCK] = float("nan")
    reference.archive_step(wanted, *args)
    archive(actual, args)
    assert_same_codes(actual, wanted, codec)
    scales = codec.layout.scales(actual, codec.layout.k_scales)[:, 0]
    assert int((scales.view(torch.int16) != 0x7777).sum()) == 48 + 48 + 48  # 48 tokens stay raw
    assert scales.isfinite().all()


def test_a_step_in_which_nothing_leaves(device):
    sequences = [(0, 0, 0), (298, 1, 0), (302, 1, 192)]
    _, _, actual, args = make_case("k8v4", torch.bfloat16, POLICY, sequences, 1, 64, device)
    archive(actual, args)
    assert (actual == 0x77).all()


def archive_key(codec, key, device):
    """`key`, as K and V of a sequence's first tokens, archived by both."""
    step = step_tensors([(0, len(key), 0)], device)
    table = torch.ones(1, 1, dtype=torch.int32, device=device)
    recent = torch.zeros(1, 1, RAW_BLOCK, 128, device=device, dtype=key.dtype)
    wanted, actual = empty_pages(2, 1, codec, device)
    args = (recent, key, key, *step, table, table, EVERYTHING, codec)
    reference.archive_step(wanted, *args)
    archive(actual, args)
    assert torch.equal(actual, wanted)
    return actual


@pytest.mark.parametrize("name", list(FORMATS))
def test_zero_vectors_have_scale_zero(name, device):
    codec = make_codec(name, 64, 1, torch.float16, device, BLOCK)
    pages = archive_key(codec, torch.zeros(3, 1, 64, device=device).half(), device)
    if name != "raw":
        scales = codec.layout.scales(pages, codec.layout.v_scales)
        assert (scales[1, 0, :3] == 0).all()


def test_ties_round_to_even(device):
    """Halves in every code: scale 1 (absmax 127) makes components of k + 1/2 exact ties."""
    codec = make_codec("k8v8", 64, 1, torch.float16, device, BLOCK)
    key = (torch.arange(64).float() - 32.5)[None, None].to(device).half()
    key[..., 0] = 127
    pages = archive_key(codec, key, device)
    (codes,) = codec.layout.codes(pages, "k")
    assert codes[1, 0, 0, 0].view(torch.int8)[1:5].tolist() == [-32, -30, -30, -28]


def test_no_sequences(device):
    _, _, actual, args = make_case("raw", torch.float16, POLICY, [(0, 1, 0)], 1, 64, device)
    none = (args[3][:1], args[4][:0], args[5][:0], args[6][:0], args[7][:0])
    archive(actual, (*args[:3], *none, *args[8:]))
    assert (actual == 0x77).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["k8v8", "plain-mixed"])
def test_codes_at_the_end_of_the_dtype(name, dtype, device):
    """Bit for bit where scales round up past it, and for the smallest values.

    Subnormal ones in float16 alone: of bfloat16 the interpreter drops them.
    """
    codec = make_codec(name, 64, 1, dtype, device, BLOCK)
    least, end = (0x80, 0x7F80) if dtype == torch.bfloat16 else (0, 0x7C00)
    patterns = torch.arange(least, end, dtype=torch.int16)
    key = torch.cat([patterns[:512], patterns[-1536:]]).view(dtype).view(32, 1, 64).to(device)
    for sign in (1, -1):
        archive_key(codec, sign * key, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(FORMATS))
def test_the_largest_values_come_back_finite(name, dtype, device):
    """Through pages, both kernels and both references, whatever the basis."""
    codec = make_codec(name, 64, 1, dtype, device, BLOCK)
    most = torch.finfo(dtype).max
    signs = torch.randint(0, 2, (32, 1, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    key = (signs * most).to(dtype).to(device)
    key[0] = most
    step = step_tensors([(0, 32, 0)], device)
    table = torch.ones(1, 1, dtype=torch.int32, device=device)
    recent = torch.zeros(2, 1, RAW_BLOCK, 128, device=device, dtype=dtype)
    wanted, actual = empty_pages(2, 1, codec, device)
    args = (recent, key, key, *step, table, table, EVERYTHING, codec)
    reference.archive_step(wanted, *args)
    archive(actual, args)
    step = (*step_tensors([(32, 0, 32)], device), table, table)
    offsets = torch.zeros(1, dtype=torch.int32, device=device)
    for pages, gather in ((wanted, reference.gather), (actual, expand.gather)):
        for region in (codec.layout.k_scales, codec.layout.v_scales):
            assert codec.layout.scales(pages, region)[1, 0, :32].isfinite().all()
        k, v = torch.full((2, 32, 1, 64), float("nan"), device=device, dtype=dtype)
        gather(pages, recent, key[:0], key[:0], *step, offsets, 32, k, v, codec)
        assert k.isfinite().all() and v.isfinite().all()
