"""Second moments against all activations of a plain hook, stacked in one go."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, MambaConfig, MambaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vllm_kvpca.calibration.collect import (
    AttentionShape,
    Moments,
    attention_shape,
    collect,
    first_position,
    positions_of,
)
from vllm_kvpca.calibration.fit import band_energy, fit_bases, preset_config, wanted
from vllm_kvpca.calibration.text import windows
from vllm_kvpca.codec import encoder, hadamard_basis
from vllm_kvpca.codec.basis import orthonormality_error
from vllm_kvpca.errors import CalibrationError, UnsupportedError
from vllm_kvpca.preset import load_preset, save_preset

ROUNDING = 1e-5
"""The model computes in float32, the hook and the cache see the same values: sums agree to
about 1e-6 of the largest entry."""


def hooked(model: Any, sequences: list[list[int]], which: str = "v") -> torch.Tensor:
    """(layers, tokens, kv_heads, head_dim) outputs of v_proj (or k_proj, before RoPE)."""
    outputs: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    hooks = [
        getattr(layer.self_attn, f"{which}_proj").register_forward_hook(
            lambda module, args, out, kept=kept: kept.append(out[0])
        )
        for layer, kept in zip(model.model.layers, outputs, strict=True)
    ]
    with torch.inference_mode():
        for sequence in sequences:
            model(torch.tensor([sequence]), use_cache=False)
    for hook in hooks:
        hook.remove()
    stacked = torch.stack([torch.cat(kept) for kept in outputs])
    return stacked.unflatten(-1, (-1, model.config.head_dim)).double()


@pytest.fixture(scope="module")
def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(0, 320, (length,), generator=generator).tolist()
        for length in (64, 1, 64, 17, 63)
    ]


def test_moments_of_v_are_those_of_all_activations(model: Any, sequences: list[list[int]]):
    counted: list[int] = []
    moments = collect(model, attention_shape(model), ["v"], sequences, counted.append)
    v = hooked(model, sequences)
    expected = torch.einsum("lthd,lthe->lhde", v, v) / v.shape[1]
    assert moments.tokens == sum(counted) == v.shape[1] == 209
    assert moments.mean("v").dtype == torch.float64
    torch.testing.assert_close(
        moments.mean("v"), expected, rtol=0, atol=ROUNDING * float(expected.abs().max())
    )


def test_k_is_taken_after_rope(model: Any, sequences: list[list[int]]):
    moments = collect(model, attention_shape(model), ["k", "v"], sequences)
    k = hooked(model, sequences, "k")
    # A rotation changes directions but no lengths, so the traces agree and the entries do not.
    traces = moments.mean("k").diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(traces, k.square().sum(-1).mean(1), rtol=ROUNDING, atol=0)
    before = torch.einsum("lthd,lthe->lhde", k, k) / k.shape[1]
    assert (moments.mean("k") - before).abs().max() > 0.01 * before.abs().max()


def test_queries_are_those_the_attention_sees(model: Any, sequences: list[list[int]]):
    """Rotated queries of one window, against q_proj and transformers' own rotary embedding."""
    window = sequences[0]
    moments = collect(model, attention_shape(model), ["k", "q"], [window])
    q = hooked(model, [window], "q")  # (layers, tokens, heads, head_dim)
    positions = torch.arange(len(window))[None]
    cos, sin = model.model.rotary_emb(torch.zeros(1), positions)
    q, _ = apply_rotary_pos_emb(q, q, cos.double(), sin.double(), unsqueeze_dim=2)
    groups = q.unflatten(2, (2, 2))  # query heads 0 and 1 read KV head 0
    expected = torch.einsum("lthgd,lthge->lhde", groups, groups) / len(window)
    torch.testing.assert_close(moments.mean("q"), expected, rtol=1e-4, atol=1e-6)
    assert model.config._attn_implementation == "sdpa"


def test_attention_that_cannot_be_observed_is_refused(model: Any):
    model.set_attn_implementation("eager")
    try:
        with pytest.raises(UnsupportedError, match="eager"):
            collect(model, attention_shape(model), ["k", "q"], [[5, 6, 7]])
    finally:
        model.set_attn_implementation("sdpa")


def test_a_query_weighted_basis_puts_first_what_queries_look_at():
    """K is strong along axes 0 to 3, queries along 4 to 7: both belong to the 8-bit band."""
    strengths = {"k": [9.0] * 4 + [1.0] * 4 + [0.1] * 24, "q": [0.1] * 4 + [9.0] * 4 + [0.1] * 24}
    moments = Moments(
        {w: {0: torch.diag(torch.tensor(x).double())[None]} for w, x in strengths.items()}, tokens=1
    )
    shape = AttentionShape(num_layers=1, num_kv_heads=1, head_dim=32, layers=(0,))
    config = preset_config("k5v4", "org/Tiny", None, shape)
    assert wanted(config) == ["k", "q"]
    bases = fit_bases(moments, config)
    assert list(bases) == ["k"] and orthonormality_error(bases["k"]) < 1e-6
    first = bases["k"][0, 0, :, :8]  # 1/4 of the components
    torch.testing.assert_close(
        first.square().sum(-1), torch.tensor([1.0] * 8 + [0.0] * 24), rtol=0, atol=1e-6
    )
    # Mixed: every component takes the same part of the band's energy.
    energy = (first * (moments.mean("k")[0, 0].float() @ first)).sum(0)
    torch.testing.assert_close(energy, torch.full((8,), 5.0), rtol=1e-5, atol=0)


def test_a_balanced_basis_is_fitted_to_keys_and_queries(
    model: Any, sequences: list[list[int]], tmp_path: Path
):
    """Saved and loaded as float16: errors of K count less in scores than in a Hadamard basis."""
    shape = attention_shape(model)
    moments = collect(model, shape, ["k", "q"], sequences)
    config = preset_config("k4v4", "org/Tiny", None, shape)
    assert wanted(config) == ["k", "q"]
    save_preset(tmp_path, config, fit_bases(moments, config), "card")
    basis = load_preset(tmp_path).bases["k"].double()
    k, q = moments.mean("k"), moments.mean("q")

    def loss(basis: torch.Tensor) -> torch.Tensor:
        keys = (encoder(basis).mT @ k @ encoder(basis)).diagonal(dim1=-2, dim2=-1)
        return keys.sum(-1) * (basis.mT @ q @ basis).diagonal(dim1=-2, dim2=-1).sum(-1)

    hadamard = hadamard_basis(32).double().expand_as(basis)
    assert (loss(basis) < 0.9 * loss(hadamard)).all()
    # Mixed: within 2 % every component takes the same part of the energy.
    energy = (encoder(basis).mT @ k @ encoder(basis)).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(
        energy / energy.mean(-1, keepdim=True), torch.ones_like(energy), rtol=0.02, atol=0
    )


def test_a_window_does_not_see_the_one_before(model: Any, sequences: list[list[int]]):
    shape = attention_shape(model)
    alone = [collect(model, shape, ["v"], [sequence]) for sequence in sequences]
    together = collect(model, shape, ["v"], sequences)
    mean = sum(one.mean("v") * one.tokens for one in alone) / together.tokens
    torch.testing.assert_close(together.mean("v"), mean, rtol=1e-12, atol=1e-15)


def test_the_basis_diagonalizes_the_second_moment(model: Any, sequences: list[list[int]]):
    shape = attention_shape(model)
    moments = collect(model, shape, ["v"], sequences)
    config = preset_config("v-rank-int8", "org/Tiny", None, shape)
    bases = fit_bases(moments, config)
    v = hooked(model, sequences)
    y = torch.einsum("lthd,lhdc->lthc", v, bases["v"].double())
    moment = torch.einsum("lthc,lthd->lhcd", y, y) / v.shape[1]
    energy = moment.diagonal(dim1=-2, dim2=-1)
    off = moment - torch.diag_embed(energy)
    assert off.abs().max() < 1e-5 * energy.max()
    assert (energy[..., :-1] >= energy[..., 1:] - 1e-6 * energy.max()).all()
    # What the first components leave out is the sum of the smallest eigenvalues, no more.
    eigenvalues = torch.linalg.eigvalsh(moments.mean("v"))
    torch.testing.assert_close(
        energy[..., 24:].sum(-1), eigenvalues[..., :8].sum(-1), rtol=1e-4, atol=0
    )
    kept = float((energy[..., :24].sum(-1) / energy.sum(-1)).mean())
    assert band_energy(moments, bases, config)["v"] == pytest.approx([kept, 1 - kept], abs=1e-5)
    assert config.layers is None and config.model is not None
    assert (config.model.num_layers, config.model.num_kv_heads, config.model.head_dim) == (3, 2, 32)


def test_same_seed_same_preset(model: Any, tokenizer: Any, text_file: Path, tmp_path: Path):
    shape = attention_shape(model)
    for run in ("first", "second"):
        moments = collect(model, shape, ["v"], windows([text_file], tokenizer, 64, 4000, seed=3))
        config = preset_config("v-rank-int8", "org/Tiny", "abc", shape)
        save_preset(tmp_path / run, config, fit_bases(moments, config), "card")
    for file in ("config.json", "basis.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert load_preset(tmp_path / "first").bases["v"].shape == (3, 2, 32, 32)


def test_only_full_attention_layers_are_collected():
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
    )
    model = Gemma3ForCausalLM(config).eval()
    shape = attention_shape(model)
    assert (shape.num_layers, shape.layers) == (4, (1, 3))
    sequences = [list(range(40)), list(range(20, 50))]
    moments = collect(model, shape, ["v"], sequences)
    v = hooked(model, sequences)[list(shape.layers)]
    expected = torch.einsum("lthd,lthe->lhde", v, v) / v.shape[1]
    torch.testing.assert_close(moments.mean("v"), expected, rtol=1e-4, atol=1e-6)
    config = preset_config("v-rank-int8", "org/Tiny-Gemma", None, shape)
    assert config.layers == (1, 3)
    assert fit_bases(moments, config)["v"].shape == (2, 1, 32, 32)


def test_a_model_without_attention_is_refused():
    config = MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)
    with pytest.raises(UnsupportedError, match="mamba"):
        attention_shape(MambaForCausalLM(config).eval())


def test_nan_is_refused(model: Any):
    shape = attention_shape(model)
    moments = collect(model, shape, ["v"], [[5, 6, 7]])
    moments.sums["v"][1][0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match="float32"):
        fit_bases(moments, preset_config("v-mixed", "org/Tiny", None, shape))


def test_windows_begin_all_over_the_context():
    starts = [first_position(i, 1000) for i in range(16)]
    assert starts[0] == 0 and max(starts) < 1000
    # Every eighth of the context has its windows, and the first half of them is spread alike.
    assert {start * 8 // 1000 for start in starts} == set(range(8))
    assert len({start * 4 // 1000 for start in starts[:8]}) == 4
    assert first_position(5, -3) == 0


def test_attention_is_the_same_wherever_a_window_begins(model):
    """K turns with its position; V and what the model makes of both do not change."""
    shape = attention_shape(model)
    windows = [[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]]
    near = collect(model, shape, ["k", "v", "q"], windows)
    far = collect(model, shape, ["k", "v", "q"], windows, context=positions_of(model))
    torch.testing.assert_close(far.mean("v"), near.mean("v"), rtol=1e-4, atol=1e-6)
    assert not torch.allclose(far.mean("k"), near.mean("k"), rtol=1e-2)
    lengths = [moments.mean("k").diagonal(dim1=-2, dim2=-1).sum(-1) for moments in (near, far)]
    torch.testing.assert_close(*lengths, rtol=1e-4, atol=1e-6)
