"""The torch kernels against dense attention in float64."""

from __future__ import annotations

import pytest
import torch

from vllm_kvpca.ops.archive.reference import archive_slots
from vllm_kvpca.ops.attend import parts
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.ops.store.reference import store_slots
from vllm_kvpca.preset import FORMATS, Preset

HEAD_DIM = 64
RAW_BLOCK = 32


def dense(query, key, value, visible, scale, soft_cap=None):
    """query (rows, dim), key and value (length, dim), visible (rows, length), float64."""
    scores = query.double() @ key.double().T * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible, float("-inf"))
    return torch.softmax(scores, -1) @ value.double()


def make_codec(name: str, heads: int, block: int = 48) -> LayerCodec:
    preset = Preset(name, FORMATS[name])
    k, v = (preset.basis(which, 0, list(range(heads)), HEAD_DIM) for which in "kv")
    return LayerCodec(preset.layout(HEAD_DIM, block), k, v, torch.bfloat16)


@pytest.mark.parametrize("tokens", [1, 16, 33, 63])
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("soft_cap", [None, 5.0])
def test_new_tokens_attend_causally(tokens, group, soft_cap):
    torch.manual_seed(0)
    query = torch.randn(2, 3, tokens * group, HEAD_DIM)
    key, value = torch.randn(2, 2, 3, tokens, HEAD_DIM)
    part = parts.attend_new(query, key, value, group, Softmax(0.125, soft_cap))
    visible = torch.ones(tokens, tokens, dtype=torch.bool).tril().repeat_interleave(group, 0)
    for b in range(2):
        for h in range(3):
            wanted = dense(query[b, h], key[b, h], value[b, h], visible, 0.125, soft_cap)
            torch.testing.assert_close(part.out[b, h].double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 40])
@pytest.mark.parametrize("skips", [[0, 0, 0], [0, 5, 31]])
def test_recent_tokens_ignore_what_lies_outside(rows, skips):
    """Blocks past a sequence's end hold NaN, and its first tokens may be archived."""
    torch.manual_seed(1)
    lengths = torch.tensor([1, 33, 95])
    recent = torch.full((9, 2, RAW_BLOCK, 2 * HEAD_DIM), float("nan"), dtype=torch.bfloat16)
    key, value = torch.randn(2, 3, 96, 2, HEAD_DIM).bfloat16()
    table = torch.tensor([[4, 0, 0], [7, 2, 0], [1, 3, 8]])
    for i, n in enumerate(lengths.tolist()):
        position = torch.arange(n)
        slots = table[i, position // RAW_BLOCK] * RAW_BLOCK + position % RAW_BLOCK
        store_slots(recent, key[i, :n], value[i, :n], slots)
        recent[table[i, 0], :, : skips[i]] = float("nan")
    query = torch.randn(3, 2, rows, HEAD_DIM)
    skips = torch.tensor(skips)
    part = parts.attend_recent(query, recent, table, skips, lengths - skips, Softmax(0.125))
    for i, (skip, n) in enumerate(zip(skips.tolist(), lengths.tolist(), strict=True)):
        for h in range(2):
            seen = torch.ones(rows, n - skip).bool()
            wanted = dense(query[i, h], key[i, skip:n, h], value[i, skip:n, h], seen, 0.125)
            torch.testing.assert_close(part.out[i, h].double(), wanted, rtol=1e-4, atol=1e-5)


# Relative RMS error of the output against dense attention over the raw tokens. `raw` only
# changes the order of float32 sums; 8 bits round by 1/254 of the largest component, 4 bits
# by 1/14, and attention over n tokens averages that down (n = 1 is the worst case here).
TOLERANCE = {"raw": 1e-5, "k8v8": 0.01, "k8v4": 0.15, "kh8v4": 0.15, "v-hadamard-mixed": 0.15}


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("rows", [3, 40])
def test_archived_tokens_in_component_space(name, rows):
    torch.manual_seed(2)
    codec = make_codec(name, heads=2)
    block = codec.layout.block_size
    lengths = torch.tensor([1, 17, 48, 140])
    pages = torch.randint(0, 256, (12, 2, codec.layout.head_bytes), dtype=torch.uint8)
    table = torch.tensor([[5, 0, 0], [9, 0, 0], [2, 0, 0], [7, 1, 11]])
    key, value = torch.randn(2, 4, 144, 2, HEAD_DIM).bfloat16()
    for i, n in enumerate(lengths.tolist()):
        position = torch.arange(n)
        slots = table[i, position // block] * block + position % block
        archive_slots(pages, key[i, :n], value[i, :n], slots, position, codec)
    query = torch.randn(4, 2, rows, HEAD_DIM)
    part = parts.attend_archive(query, pages, table, lengths, codec, Softmax(0.125))
    for i, n in enumerate(lengths.tolist()):
        for h in range(2):
            wanted = dense(
                query[i, h], key[i, :n, h], value[i, :n, h], torch.ones(rows, n).bool(), 0.125
            )
            error = (part.out[i, h].double() - wanted).norm() / wanted.norm()
            assert error < TOLERANCE[name], (name, n, float(error))


def test_keys_in_a_basis_that_is_not_orthonormal():
    """Scores come out as if the basis were not there, in 8 bits."""
    torch.manual_seed(2)
    plain = make_codec("k8v8", heads=2)
    basis = torch.linalg.qr(torch.randn(2, HEAD_DIM, HEAD_DIM))[0]
    basis = (torch.logspace(-0.5, 0.5, HEAD_DIM)[:, None] * basis).contiguous()
    codec = LayerCodec(plain.layout, basis, None, torch.bfloat16)
    key = torch.randn(50, 2, HEAD_DIM)
    query = torch.randn(1, 2, 7, HEAD_DIM)
    positions = torch.arange(len(key))
    components = codec.decode(*codec.encode(key, "k", positions), "k")
    scores = torch.einsum("hrc,thc->hrt", codec.rotate_query(query)[0], components)
    wanted = torch.einsum("hrd,thd->hrt", query[0].double(), key.double())
    # 8 bits round by 1/254 of the largest component; what stretches 3-fold counts 3-fold.
    assert (scores - wanted).norm() / wanted.norm() < 0.03
    restored = codec.restore(components, "k", positions)
    assert (restored - key).norm() / key.norm() < 0.03


def test_tiles_of_a_long_archive_merge(monkeypatch):
    """A workspace of a few blocks gives what one large one gives."""
    torch.manual_seed(3)
    codec = make_codec("k8v4", heads=1)
    block = codec.layout.block_size
    pages = torch.zeros(8, 1, codec.layout.head_bytes, dtype=torch.uint8)
    key, value = torch.randn(2, 300, 1, HEAD_DIM).bfloat16()
    position = torch.arange(300)
    archive_slots(pages, key, value, block + position, position, codec)
    table = torch.arange(1, 8)[None]
    query = torch.randn(1, 1, 3, HEAD_DIM)
    whole = parts.attend_archive(query, pages, table, torch.tensor([300]), codec, Softmax(0.125))
    monkeypatch.setattr("vllm_kvpca.ops.attend.parts.TILE_TOKENS", 2 * block)
    tiled = parts.attend_archive(query, pages, table, torch.tensor([300]), codec, Softmax(0.125))
    # float32 sums of 300 products in another order: a few units in the last place of 1.
    torch.testing.assert_close(tiled.out, whole.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiled.lse, whole.lse, rtol=1e-5, atol=1e-6)


def test_slot_minus_one_leaves_the_cache_untouched():
    codec = make_codec("k8v4", heads=1)
    pages = torch.full((2, 1, codec.layout.head_bytes), 7, dtype=torch.uint8)
    recent = torch.full((2, 1, RAW_BLOCK, 2 * HEAD_DIM), 7.0, dtype=torch.bfloat16)
    key, value = torch.randn(2, 5, 1, HEAD_DIM).bfloat16()
    nowhere = torch.full((5,), -1)
    archive_slots(pages, key, value, nowhere, torch.arange(5), codec)
    store_slots(recent, key, value, nowhere)
    assert (pages == 7).all() and (recent == 7).all()
