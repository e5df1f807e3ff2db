"""The cache by itself: what it holds, when it archives, how batches and crops change it."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, Qwen2Config

from vllm_kvpca import load_preset_cache
from vllm_kvpca.codec import hadamard_basis
from vllm_kvpca.errors import (
    LayoutError,
    OptionsError,
    PresetMismatch,
    PresetNotFound,
    UnsupportedError,
)
from vllm_kvpca.hf_cache import PresetCache
from vllm_kvpca.pages.boundary import boundary
from vllm_kvpca.preset import ModelShape, PresetConfig, load_preset, save_preset
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS

ARCHIVING = {"compress_after": 40, "keep_recent": 8}
HEADS, HEAD_DIM = 2, 32


def states(tokens: int, batch: int = 2, seed: int = 0, head_dim: int = HEAD_DIM) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, HEADS, tokens, head_dim, generator=generator).bfloat16()


def feed(cache: PresetCache, tokens: int, seed: int = 0, batch: int = 2) -> tuple:
    """The same K and V into every layer."""
    k, v = states(tokens, batch, seed), states(tokens, batch, seed + 100)
    first, *_ = [cache.update(k, v, layer) for layer in range(len(cache))]
    return first


def held_bytes(cache: PresetCache) -> int:
    """Bytes of all storages that the layers keep alive, found by looking at every attribute."""
    storages = {}
    for layer in cache.layers:
        for owner in (layer, layer.k_archive, layer.v_archive):
            for value in vars(owner).values():
                if isinstance(value, torch.Tensor):
                    storage = value.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    storages.pop(0, None)  # empty tensors share the null address
    return sum(storages.values())


@pytest.fixture
def calibrated(tmp_path: Path) -> Path:
    """A preset for 3 layers of 2 heads of 32, a different basis in each."""
    description, k, v, *_ = CALIBRATED_FORMATS["v-mixed"]
    shape = ModelShape(name="org/Tiny", num_layers=3, num_kv_heads=HEADS, head_dim=HEAD_DIM)
    generator = torch.Generator().manual_seed(5)
    bases = torch.linalg.qr(torch.randn(3, HEADS, HEAD_DIM, HEAD_DIM, generator=generator)).Q
    config = PresetConfig(format="v-mixed", description=description, k=k, v=v, model=shape)
    save_preset(tmp_path, config, {"v": bases.contiguous()}, "")
    return tmp_path


# --- what is stored -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raw", "k8v8", "k8v4", "v-hadamard-mixed"])
def test_tensors_take_the_bytes_that_the_ratio_promises(name):
    cache = load_preset_cache(name, 3, adaptive=False)
    feed(cache, 100)
    feed(cache, 1, seed=1)
    raw = 3 * 2 * HEADS * 101 * 2 * HEAD_DIM * 2
    ratio = load_preset(name).layout(HEAD_DIM).total_ratio
    assert held_bytes(cache) == pytest.approx(raw / ratio, abs=0.5)
    stats = cache.get_memory_stats()
    assert stats["archived_bytes"] == held_bytes(cache) and stats["raw_bytes"] == 0
    assert stats["uncompressed_bytes"] == raw and stats["total_ratio"] == pytest.approx(ratio)


def test_an_adaptive_cache_holds_the_recent_tokens_raw_and_nothing_else():
    cache = load_preset_cache("k8v4", 3, **ARCHIVING)
    feed(cache, 100)
    stats = cache.get_memory_stats()
    assert (stats["tokens"], stats["archived_tokens"], stats["raw_tokens"]) == (100, 64, 36)
    per_token = 3 * 2 * HEADS * torch.tensor([HEAD_DIM * 1.5 + 4, HEAD_DIM * 4])
    assert held_bytes(cache) == int(per_token @ torch.tensor([64.0, 36.0]))
    assert held_bytes(cache) == stats["archived_bytes"] + stats["raw_bytes"]


def test_archived_tokens_come_back_as_the_format_says():
    """Against plain arithmetic: K int8 and V int4 after a Hadamard rotation, scales in bf16."""

    def rounded(x: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
        scale = scale.bfloat16().float()
        return (x / scale).round().clamp(low, high) * scale

    cache = load_preset_cache("k8v4", 1, adaptive=False)
    feed(cache, 1500)  # more than is restored at once
    k, v = feed(cache, 1, seed=1)
    turn = hadamard_basis(HEAD_DIM)
    old_k, old_v = states(1500).float(), states(1500, seed=100).float()
    expected = rounded(old_k, old_k.abs().amax(-1, keepdim=True) / 127, -127, 127)
    torch.testing.assert_close(k[:, :, :-1], expected.bfloat16(), atol=0, rtol=0)
    y = old_v @ turn
    largest = y.gather(-1, y.abs().argmax(-1, keepdim=True))
    expected = rounded(y, largest / -8, -8, 7) @ turn.T
    torch.testing.assert_close(v[:, :, :-1].float(), expected, atol=1e-2, rtol=1e-2)  # bf16
    assert torch.equal(k[:, :, -1:], states(1, seed=1))  # new tokens are raw


def test_every_layer_uses_its_own_basis(calibrated):
    """K raw; V: 16 components in int8 (3/8 of 32, rounded to eights), 16 in int4."""
    cache = load_preset_cache(calibrated, 3, adaptive=False)
    v = states(64, seed=100)
    for layer in range(3):
        cache.update(states(64), v, layer)
    for layer in range(3):
        basis = load_preset(calibrated).bases["v"][layer]
        y = torch.einsum("bhtd,hdc->bhtc", v.float(), basis)
        codes = cache.layers[layer].v_archive.codes[..., :16].view(torch.int8)
        scale = (y[..., :16].abs().amax(-1, keepdim=True) / 127).bfloat16()
        assert (codes.transpose(1, 2) - (y[..., :16] / scale).round()).abs().max() <= 1
        k_back, v_back = cache.update(states(1), states(1), layer)
        assert torch.equal(k_back[:, :, :64], states(64))
        error = (v_back[:, :, :64].float() - v.float()).norm() / v.float().norm()
        assert error < 0.12


# --- when -----------------------------------------------------------------------------------


def test_the_boundary_follows_the_policy_and_codes_never_change():
    cache = load_preset_cache("k8v4", 1, **ARCHIVING)
    layer, length, before = cache.layers[0], 0, None
    for step in [30, 10, 1, 1, 70, 1, *[1] * 40, 33]:
        feed(cache, step, seed=length)
        length += step
        assert cache.get_seq_length() == length
        assert layer.archived == boundary(length, 40, 8, 32)
        assert cache.get_mask_sizes(5, 0) == (length + 5, 0)
        now = [x.clone() for a in (layer.k_archive, layer.v_archive) for x in (a.codes, a.scales)]
        for old, new in zip(before or [], now, strict=bool(before)):
            assert torch.equal(old, new[:, : old.shape[1]])
        before = now
    assert layer.archived == 160


@torch.no_grad()
def test_below_compress_after_it_is_dynamic_cache_bit_for_bit(model):
    ids = torch.arange(3, 43)[None]
    outputs = []
    for cache in (DynamicCache(), load_preset_cache("k8v4", 3, **ARCHIVING)):
        model(ids[:, :30], past_key_values=cache)
        outputs.append(model(ids[:, 30:], past_key_values=cache).logits)
    assert torch.equal(*outputs)


# --- gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raw", "k8v8", "k8v4", "calibrated"])
@pytest.mark.parametrize("adaptive", [True, False])
def test_a_forward_pass_may_record_gradients(name, adaptive, model, calibrated):
    """The same logits as without, and nothing stored belongs to a graph or keeps one alive."""
    ids = torch.arange(3, 103)[None]
    logits = []
    for recording in (True, False):
        preset = calibrated if name == "calibrated" else name
        cache = load_preset_cache(preset, 3, adaptive=adaptive, **ARCHIVING)
        with torch.set_grad_enabled(recording):
            parts = [model(part, past_key_values=cache).logits for part in ids.split(30, 1)]
        logits.append(torch.cat(parts, 1))
        assert cache.layers[0].archived > 30
        for layer in cache.layers:
            for archive in (layer.k_archive, layer.v_archive):
                assert not archive.codes.requires_grad and not archive.scales.requires_grad
            for recent in (layer.keys, layer.values):
                assert not recent.requires_grad and recent.grad_fn is None
    assert torch.equal(*logits)
    assert logits[0].requires_grad


def test_gradients_flow_to_new_tokens_and_stored_ones_are_constants():
    """Against attention over the same K and V in plain torch."""
    cache = load_preset_cache("k8v4", 1, **ARCHIVING)
    old = [states(100, seed=s).float().requires_grad_() for s in (1, 2)]
    cache.update(*old, 0)
    new = [states(7, seed=s).float().requires_grad_() for s in (3, 4)]
    query = states(7, seed=5).float().requires_grad_()
    keys, values = cache.update(*new, 0)
    wanted = torch.autograd.grad(_attended(query, keys, values), [query, *new])
    past = [x[:, :, :100].detach() for x in (keys, values)]
    again = [torch.cat([stored, x], 2) for stored, x in zip(past, new, strict=True)]
    actual = torch.autograd.grad(_attended(query, *again), [query, *new])
    for a, b in zip(actual, wanted, strict=True):
        torch.testing.assert_close(a, b)
        assert b.abs().sum() > 0
    keys, values = cache.update(*(x.detach() for x in new), 0)
    assert not keys.requires_grad and not values.requires_grad


def _attended(*qkv: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(*qkv).square().sum()


@pytest.mark.parametrize("name", ["k8v8", "k8v4", "calibrated"])
def test_float16_stays_finite_up_to_its_end(name, calibrated):
    preset = calibrated if name == "calibrated" else name
    cache = load_preset_cache(preset, 3, adaptive=False)
    large = torch.full((1, HEADS, 9, HEAD_DIM), 65_504.0).half()
    large[:, :, ::2, ::3] = -65_300.0
    for layer in range(3):
        cache.update(large, large, layer)
    keys, values = cache.update(*states(1, 1).half().repeat(2, 1, 1, 1, 1), 0)
    for got in (keys, values):
        assert got.isfinite().all()
        error = (got[:, :, :9].float() - large.float()).norm() / large.float().norm()
        assert error < 0.1


# --- batches, crops, reset ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "rows"),
    [
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1, 2])), [1, 2]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ],
    ids=["reorder", "select", "repeat"],
)
@torch.no_grad()
def test_rows_are_what_they_would_be_from_the_start(model, change, rows):
    ids = torch.randint(3, 320, (3, 101), generator=torch.Generator().manual_seed(3))
    changed, fresh = (load_preset_cache("k8v4", 3, **ARCHIVING) for _ in range(2))
    for cache, batch in ((changed, ids), (fresh, ids[rows])):
        model(batch[:, :100], past_key_values=cache)
    change(changed)
    after = [model(ids[rows, 100:], past_key_values=c).logits for c in (changed, fresh)]
    # Batches of other sizes round differently, which may move a code by one step.
    torch.testing.assert_close(*after, atol=2e-2, rtol=0)


@pytest.mark.parametrize("crop", [-10, -60, -100, 90, 40, 0, 500])
def test_after_a_crop_the_first_tokens_are_left(crop):
    cache = load_preset_cache("k8v4", 2, **ARCHIVING)
    kept = 100 if crop in (0, 500) else crop if crop > 0 else 100 + crop
    feed(cache, 100)
    before = feed_one_and_undo(cache)
    cache.crop(crop)
    assert cache.get_seq_length() == kept
    assert cache.layers[1].archived == min(64, kept)
    after = feed_one_and_undo(cache)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:, :, :kept], new[:, :, :kept]) and new.shape[2] == kept + 1
    raw = states(100)[:, :, 64:kept]
    assert torch.equal(after[0][:, :, 64:kept], raw)
    assert held_bytes(cache) == sum(cache.get_memory_stats()[f"{x}_bytes"] for x in MEMORY)


MEMORY = ("archived", "raw")


def feed_one_and_undo(cache: PresetCache) -> tuple[torch.Tensor, torch.Tensor]:
    seen = feed(cache, 1, seed=9)
    cache.crop(-1)
    return seen


def test_after_a_reset_it_is_new_and_takes_another_batch_size():
    cache = load_preset_cache("k8v4", 2, **ARCHIVING)
    feed(cache, 100)
    cache.reset()
    assert cache.get_seq_length() == 0 and cache.get_memory_stats()["total_ratio"] == 1.0
    feed(cache, 60, batch=5)
    again, fresh = feed(cache, 1, seed=1, batch=5), load_preset_cache("k8v4", 2, **ARCHIVING)
    feed(fresh, 60, batch=5)
    assert all(map(torch.equal, again, feed(fresh, 1, seed=1, batch=5)))


# --- what is refused ------------------------------------------------------------------------


def test_refusals_when_the_cache_is_made(calibrated, model):
    with pytest.raises(PresetMismatch, match=r"num_layers 3 \(the model has 4\).*calibrate"):
        load_preset_cache(calibrated, num_layers=4)
    with pytest.raises(PresetMismatch, match="config says 3"):
        load_preset_cache("k8v4", num_layers=4, config=model.config)
    with pytest.raises(OptionsError, match="num_layers is None"):
        load_preset_cache("k8v4")
    with pytest.raises(OptionsError, match=r"keep_recent \(256\) exceeds compress_after"):
        load_preset_cache("k8v4", 3, compress_after=100)
    with pytest.raises(PresetNotFound, match="no preset"):
        load_preset_cache("./nothing/there", 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 4}, r"num_kv_heads 2 \(the model has 4\)"),
        ({"head_dim": 64}, r"head_dim 32 \(the model has 64\)"),
        ({"_name_or_path": "/models/Other"}, "whether '/models/Other' is that model"),
    ],
)
def test_a_config_of_another_model_is_refused_at_once(calibrated, model, changes, words):
    config = type(model.config)(**(model.config.to_dict() | changes))
    config._name_or_path = changes.get("_name_or_path", "")
    with pytest.raises(PresetMismatch, match=words):
        load_preset_cache(calibrated, config=config)
    config = type(model.config)(**model.config.to_dict())
    config._name_or_path = "somewhere/Tiny"
    assert load_preset_cache(calibrated, config=config).get_seq_length() == 0


def test_a_head_dim_that_the_config_leaves_out_is_compared_at_once(calibrated):
    config = Qwen2Config(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=256
    )
    with pytest.raises(PresetMismatch, match=r"head_dim 32 \(the model has 64\)"):
        load_preset_cache(calibrated, config=config)
    config.hidden_size = 128
    assert load_preset_cache(calibrated, config=config).get_seq_length() == 0


@pytest.mark.parametrize(
    ("k", "v", "error", "words"),
    [
        (states(5, head_dim=64), states(5, head_dim=64), PresetMismatch, "head_dim 32"),
        (states(5)[:, :1], states(5)[:, :1], PresetMismatch, r"num_kv_heads 2 \(the model has 1\)"),
        (states(5), states(5, head_dim=64), UnsupportedError, "DynamicCache"),
    ],
)
def test_another_shape_is_refused_before_anything_is_stored(calibrated, k, v, error, words):
    cache = load_preset_cache(calibrated, num_layers=3)
    with pytest.raises(error, match=words):
        cache.update(k, v, 0)
    gc.collect()
    assert cache.get_memory_stats()["tokens"] == 0 and cache.layers[0].keys is None
    assert cache.get_memory_stats()["basis_bytes"] == 0


def test_a_head_dim_that_cannot_be_laid_out():
    odd: Any = states(5, head_dim=20)
    with pytest.raises(LayoutError, match="20 is not a multiple"):
        load_preset_cache("k8v4", 1).update(odd, odd, 0)


def test_a_wrong_layer_count_and_device_are_refused(model):
    ids = torch.arange(3, 10)[None]
    with pytest.raises(PresetMismatch, match=r"made for 2 layers.*more.*config=model\.config"):
        model.generate(ids, past_key_values=load_preset_cache("k8v4", 2), max_new_tokens=3)
    with pytest.raises(PresetMismatch, match=r"made for 4 layers.*fewer"):
        model.generate(ids, past_key_values=load_preset_cache("k8v4", 4), max_new_tokens=3)
    with pytest.raises(OptionsError, match=r"asked for on meta.*device=model\.device"):
        model(ids, past_key_values=load_preset_cache("k8v4", 3, "meta"))
