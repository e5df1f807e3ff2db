"""The expand kernels against their torch reference."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    FORMATS,
    add_bias,
    assert_expanded,
    filled_recent,
    make_codec,
    make_plan,
    make_table,
    plan_step,
    random_tokens,
    step_tensors,
    strided_cache,
)

from vllm_kvpca.ops.archive.reference import archive_slots
from vllm_kvpca.ops.expand import reference
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.store.reference import store_slots
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.step_plan import PrefillGroup, StepTokens

kernel = pytest.importorskip("vllm_kvpca.ops.expand.kernel", exc_type=ImportError)

RAW_BLOCK = 32
BLOCK = 48
SEQUENCES = [
    (70, 3, 50),  # some of everything
    (0, 5, 0),  # new tokens only
    (48, 1, 48),  # nothing raw but the new token
    (40, 17, 0),  # nothing archived
    (0, 0, 0),  # a padding row
]
LONG = [(700, 70, 576)]
POLICY = Policy(10**6, 0, BLOCK)
"""Nothing is archived in these steps: the cases say what was before."""


def filled_pages(blocks, heads, codec, dtype, device):
    """Archive pages of random tokens; the null block is NaN (0xFF)."""
    head_bytes = codec.layout.head_bytes
    pages = strided_cache(blocks, heads, head_bytes, dtype=torch.uint8, device=device, fill=0xFF)
    tokens = (blocks - 1) * BLOCK
    key, value = random_tokens(tokens, heads, codec.layout.head_dim, dtype, device)
    positions = torch.arange(tokens, device=device)
    archive_slots(pages, key, value, positions + BLOCK, positions, codec)
    return pages


def group_of(members, key_start, max_length) -> PrefillGroup:
    """Of expand's interest: which sequences, where their keys go, how long the longest is."""
    return PrefillGroup(members, slice(0), 1, max_length, True, key_start, key_start)


def make_case(name, dtype, sequences, heads, head_dim, device):
    """Codec and arguments of expand up to its outputs, for all sequences but the first.

    Their rows start at 2: something before and after them must stay as it is.
    """
    torch.manual_seed(3)
    codec = make_codec(name, head_dim, heads, dtype, device, BLOCK)
    sequences = [(9, 2, 0), *sequences]
    where = step_tensors(sequences, device)
    query_start, lengths, starts = where
    recent_table = make_table([-(-n // RAW_BLOCK) for n in lengths.tolist()], device)
    archive_table = make_table([-(-n // BLOCK) for n in starts.tolist()], device)
    for i, (_, _, start) in enumerate(sequences):
        # Raw blocks of archived tokens are given back; their rows are not read.
        recent_table[i, : start // RAW_BLOCK] = 0
    recent = filled_recent(int(recent_table.max()) + 1, heads, RAW_BLOCK, head_dim, dtype, device)
    pages = filled_pages(max(2, int(archive_table.max()) + 1), heads, codec, dtype, device)
    key, value = random_tokens(int(query_start[-1]), heads, head_dim, dtype, device)
    offsets = torch.nn.functional.pad(lengths[1:].cumsum(0, dtype=torch.int32), (1, 0)) + 2
    group = group_of(slice(1, len(sequences)), offsets, int(lengths[1:].max()))
    step = plan_step(make_plan(codec, RAW_BLOCK, POLICY), where, recent_table, archive_table)
    tokens = StepTokens(key, key, value, key)
    return step, group, tokens, LayerCache(recent, pages, codec)


def outputs(rows, heads, head_dim, dtype, device):
    """NaN-filled K and V, as strided views, for the kernel and for its reference."""
    shape = (rows, heads + 1, head_dim)
    return [torch.full(shape, float("nan"), dtype=dtype, device=device)[:, 1:] for _ in range(4)]


def check(name, dtype, sequences, heads, head_dim, device):
    args = make_case(name, dtype, sequences, heads, head_dim, device)
    codec = args[3].codec
    total = sum(computed + new for computed, new, _ in sequences)
    k, v, wanted_k, wanted_v = outputs(total + 4, heads, head_dim, dtype, device)
    reference.expand(*args, wanted_k, wanted_v)
    kernel.expand(*args, k, v)
    assert_expanded(k, wanted_k, codec, "k")
    assert_expanded(v, wanted_v, codec, "v")
    for out in (k, v):
        assert out[:2].isnan().all() and out[total + 2 :].isnan().all()
        assert not out[2 : total + 2].isnan().any()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_dim", [(3, 64), (1, 96), (2, 128), (1, 256)])
def test_sequences_of_every_format(name, dtype, heads, head_dim, device):
    check(name, dtype, SEQUENCES, heads, head_dim, device)


@pytest.mark.parametrize("name, dtype", [("k8v4", torch.float16), ("kv-mixed", torch.bfloat16)])
def test_a_sequence_of_many_tiles(name, dtype, device):
    check(name, dtype, LONG, 2, 64, device)


@pytest.mark.parametrize("name", ["raw", "k8v8", "v-rank-int8", "kv-mixed", "kb-mixed"])
def test_rows_are_the_tokens_that_were_archived(name, device):
    """The contract with the caller: head space, in the order of positions."""
    torch.manual_seed(5)
    codec = make_codec(name, 64, 1, torch.float16, device, BLOCK)
    key, value = torch.randn(2, 40, 1, 64, device=device).half()
    pages = torch.zeros(2, 1, codec.layout.head_bytes, dtype=torch.uint8, device=device)
    recent = torch.zeros(3, 1, RAW_BLOCK, 128, device=device).half()
    positions = torch.arange(33, device=device)
    key[:33] = add_bias(codec, key[:33], positions)
    archive_slots(pages, key[:33], value[:33], positions + BLOCK, positions, codec)
    slots = torch.arange(65, 70, device=device)  # positions 33 to 37 in block 2
    store_slots(recent, key[33:38], value[33:38], slots)
    tables = (torch.tensor([row], dtype=torch.int32, device=device) for row in ([0, 2], [1]))
    where = step_tensors([(38, 2, 33)], device)
    step = plan_step(make_plan(codec, RAW_BLOCK, POLICY), where, *tables)
    k, v = torch.empty(2, 40, 1, 64, device=device).half()
    group = group_of(slice(0, 1), torch.zeros(2, dtype=torch.int32, device=device), 40)
    tokens = StepTokens(key[38:], key[38:], value[38:], key[38:])
    kernel.expand(step, group, tokens, LayerCache(recent, pages, codec), k, v)
    assert torch.equal(k[33:], key[33:]) and torch.equal(v[33:], value[33:])
    # Relative error of a vector: codes of 8 bits in one band, of 4 bits, a quarter dropped.
    limits = {"raw": 0, "k8v8": 0.01, "kv-mixed": 0.2, "kb-mixed": 0.2, "v-rank-int8": 0.8}
    for got, wanted in ((k, key), (v, value)):
        got, wanted = got[:33].float(), wanted[:33].float()
        error = (got - wanted).norm(dim=-1) / wanted.norm(dim=-1)
        assert float(error.max()) <= limits[name]


def test_nothing_to_expand(device):
    step, group, *rest = make_case("raw", torch.float16, [(0, 1, 0)], 1, 64, device)
    k, v, _, _ = outputs(4, 1, 64, torch.float16, device)
    kernel.expand(step, group_of(slice(1, 1), group.key_start[:1], 0), *rest, k, v)
    assert k.isnan().all() and v.isnan().all()
