"""Bands: codes and scales against a plain Python reference, and what rounding may cost."""

from __future__ import annotations

import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpca.codec import Band, decode_bands, encode_bands, resolve_bands
from vllm_kvpca.codec.bands import code_bytes, narrow, num_scales, stored_width
from vllm_kvpca.errors import LayoutError

HEAD_DIMS = [64, 80, 96, 112, 128, 256]

bands_of_any_kind = st.lists(
    st.builds(Band, st.integers(1, 6).map(lambda n: 8 * n), st.sampled_from([16, 8, 4, 0])),
    min_size=1,
    max_size=5,
).map(tuple)


def float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def bfloat16(x: float) -> float:
    """Round a float32 to bfloat16, ties to even, by its bits."""
    (bits,) = struct.unpack("I", struct.pack("f", x))
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return struct.unpack("f", struct.pack("I", bits))[0]


def reference_band(y: list[float], bits: int) -> tuple[list[int], float]:
    """Code bytes and scale of one 8- or 4-bit band, one value at a time."""
    largest = max(abs(v) for v in y)
    if bits == 8:
        scale, low, high = largest / 127, -127, 127
    else:  # the largest magnitude gets the code -8; of two alike, the negative one
        scale, low, high = (largest if -largest in y else -largest) / 8, -8, 7
    scale = bfloat16(float32(scale)) or 0.0
    codes = [max(low, min(high, round(float32(v / (scale or 1.0))))) for v in y]
    if bits == 8:
        return [code & 0xFF for code in codes], scale
    half = len(y) // 2
    return [codes[j] % 16 | codes[j + half] % 16 << 4 for j in range(half)], scale


def reference_encode(y: torch.Tensor, bands: tuple[Band, ...]) -> tuple[list[int], list[float]]:
    codes: list[int] = []
    scales: list[float] = []
    start = 0
    for band in bands:
        part = y[start : start + band.width]
        start += band.width
        if band.bits == 16:
            for value in part:  # little-endian bytes of the value itself
                codes += list(struct.pack("<h", value.view(torch.int16).item()))
        elif band.bits:
            band_codes, scale = reference_band(part.float().tolist(), band.bits)
            codes += band_codes
            scales.append(scale)
    return codes, scales


def random_components(bands, seed: int, tokens: int = 5, dtype=torch.bfloat16) -> torch.Tensor:
    """Tokens of very different size, a zero vector among them."""
    generator = torch.Generator().manual_seed(seed)
    width = sum(band.width for band in bands)
    size = 10.0 ** torch.randint(-3, 3, (tokens, 1), generator=generator)
    y = torch.randn(tokens, width, generator=generator) * size
    y[0] = 0
    return y.to(dtype)


@settings(deadline=None, max_examples=60)
@given(bands_of_any_kind, st.integers(0, 10**6))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_and_scales_equal_the_reference_bit_for_bit(dtype, bands, seed):
    y = random_components(bands, seed, dtype=dtype)
    codes, scales = encode_bands(y, bands)
    assert codes.dtype == torch.uint8 and scales.dtype == torch.bfloat16
    assert codes.shape[-1] == code_bytes(bands) and scales.shape[-1] == num_scales(bands)
    for token in range(len(y)):
        wanted_codes, wanted_scales = reference_encode(y[token], bands)
        assert codes[token].tolist() == wanted_codes
        assert scales[token].tolist() == wanted_scales


@settings(deadline=None, max_examples=60)
@given(bands_of_any_kind, st.integers(0, 10**6))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decoding_is_off_by_half_a_step_at_most(dtype, bands, seed):
    y = random_components(bands, seed, dtype=dtype)
    codes, scales = encode_bands(y, bands)
    decoded = decode_bands(codes, scales, bands, raw_dtype=dtype)
    assert decoded.shape == (len(y), stored_width(bands)) and not decoded.isnan().any()
    start = column = index = 0
    for band in bands:
        if band.bits:
            error = (
                decoded[:, column : column + band.width] - y[:, start : start + band.width].float()
            )
            if band.bits == 16:
                assert not error.any()
            else:
                step = scales[:, index].float()[:, None]
                # The scale is rounded to 8 bits: the largest value may lie up to 2^-8 of
                # itself beyond the last code. In 4 bits the last code on the other side is 7, and
                # values there may reach 8 steps.
                largest, last = (127, 127) if band.bits == 8 else (8, 7)
                beyond = largest * (1 + 2.0**-8) - last
                steps = y[:, start : start + band.width].float() / torch.where(step == 0, 1, step)
                inner = (steps >= -largest) & (steps <= last)
                assert (error.abs() <= step.abs() * max(0.5, beyond) * (1 + 1e-5)).all()
                assert (error.abs() <= step.abs() * 0.5 * (1 + 1e-5))[inner].all()
                index += 1
            column += band.width
        start += band.width


def test_a_byte_holds_component_j_low_and_j_plus_half_high():
    y = torch.tensor([7.0, -8, 0, 1, 2, 3, 4, -1])
    codes, scales = encode_bands(y, [Band(8, 4)])
    assert scales.tolist() == [1.0]
    assert codes.tolist() == [0x27, 0x38, 0x40, 0xF1]  # -8 is 8 and -1 is 15


def test_the_largest_magnitude_gets_code_minus_8_whatever_its_sign():
    y = torch.tensor([8.0, -7, 0, 1, 2, 3, 4, -1])
    codes, scales = encode_bands(y, [Band(8, 4)])
    assert scales.tolist() == [-1.0]
    assert codes.tolist() == [0xE8, 0xD7, 0xC0, 0x1F]
    assert decode_bands(codes, scales, [Band(8, 4)], raw_dtype=y.dtype).tolist() == y.tolist()


def test_4_bits_lose_less_than_15_symmetric_levels_would():
    y = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    decoded = decode_bands(*encode_bands(y, [Band(64, 4)]), [Band(64, 4)], raw_dtype=y.dtype)
    step = y.abs().amax(-1, keepdim=True) / 7
    symmetric = (y / step).round() * step
    assert (decoded - y).square().mean() < 0.8 * (symmetric - y).square().mean()


def test_a_zero_vector_stays_zero():
    bands = (Band(16, 8), Band(16, 4))
    codes, scales = encode_bands(torch.zeros(3, 32), bands)
    assert not scales.any()
    assert not decode_bands(codes, scales, bands, raw_dtype=torch.bfloat16).any()


def test_leading_dimensions_are_kept():
    bands = (Band(32, 8), Band(32, 4), Band(8, 0))
    y = torch.randn(2, 3, 5, 72)
    codes, scales = encode_bands(y, bands)
    assert codes.shape == (2, 3, 5, 48) and scales.shape == (2, 3, 5, 2)
    one = encode_bands(y[1, 2, 4], bands)
    assert torch.equal(codes[1, 2, 4], one[0]) and torch.equal(scales[1, 2, 4], one[1])
    assert decode_bands(codes, scales, bands, raw_dtype=torch.bfloat16).shape == (2, 3, 5, 64)


def test_dropped_components_store_nothing():
    bands = (Band(24, 0),)
    codes, scales = encode_bands(torch.randn(4, 24), bands)
    assert codes.shape == (4, 0) and scales.shape == (4, 0)
    assert decode_bands(codes, scales, bands, raw_dtype=torch.bfloat16).shape == (4, 0)


@pytest.mark.parametrize(("width", "bits", "words"), [(8, 3, "3 bits"), (8, 6, "6 bits")])
def test_an_unknown_bit_width_is_refused(width, bits, words):
    with pytest.raises(LayoutError, match=words):
        Band(width, bits)


@pytest.mark.parametrize("width", [0, -8, 12, 63])
def test_a_width_that_is_no_multiple_of_8_is_refused(width):
    with pytest.raises(LayoutError, match=f"band of {width} components"):
        Band(width, 8)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "shares",
    [
        [(Fraction(1), 8)],
        [(Fraction(3, 8), 8), (Fraction(5, 8), 4)],
        [(Fraction(3, 4), 8), (Fraction(1, 4), 0)],
        [(Fraction(1, 4), 8), (Fraction(1, 2), 4), (Fraction(1, 4), 0)],
    ],
)
def test_bands_of_every_head_dim_add_up_to_it(head_dim, shares):
    bands = resolve_bands(shares, head_dim)
    assert sum(band.width for band in bands) == head_dim
    assert [band.bits for band in bands] == [bits for _, bits in shares]
    for band, (share, _) in zip(bands[:-1], shares[:-1], strict=True):
        assert abs(band.width - share * head_dim) <= 4


def test_known_band_widths():
    mixed = [(Fraction(3, 8), 8), (Fraction(5, 8), 4)]
    widths = {dim: [band.width for band in resolve_bands(mixed, dim)] for dim in HEAD_DIMS}
    assert widths == {
        64: [24, 40],
        80: [32, 48],
        96: [32, 64],
        112: [40, 72],
        128: [48, 80],
        256: [96, 160],
    }


@pytest.mark.parametrize(
    ("shares", "head_dim", "words"),
    [
        ([(Fraction(1, 2), 8)], 64, "add up to 1"),
        ([(Fraction(1, 2), 8), (Fraction(2, 3), 4)], 64, "add up to 1"),
        ([(Fraction(1), 8)], 100, "head_dim 100 is not a multiple of 8"),
        ([(Fraction(1, 32), 8), (Fraction(31, 32), 4)], 64, "band of 0 components"),
    ],
)
def test_shares_that_cannot_be_laid_out_are_refused(shares, head_dim, words):
    with pytest.raises(LayoutError, match=words):
        resolve_bands(shares, head_dim)


# --- the whole range of a dtype -------------------------------------------------------------

DTYPES = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
TINY = 127 * 2.0**-134
"""A scale is off by half of the least bfloat16 or less, times the largest code."""


def of_bits(patterns: list[int], dtype: torch.dtype) -> torch.Tensor:
    """The values of these bit patterns; NaN and infinity become the dtype's largest."""
    most = torch.finfo(dtype).max
    x = torch.tensor(patterns, dtype=torch.int64).to(DTYPES[dtype]).view(dtype)
    return x.nan_to_num(nan=most, posinf=most, neginf=-most)


@st.composite
def any_components(draw, dtype: torch.dtype) -> tuple[torch.Tensor, tuple[Band, ...]]:
    """One vector of any finite values, drawn by their bits so that every size is as likely."""
    bands = draw(bands_of_any_kind)
    size = 8 * dtype.itemsize
    anything = st.integers(0, 2**size - 1)
    # The last 64 patterns below infinity, of both signs: there rounding leaves the dtype.
    top = int(torch.tensor(torch.finfo(dtype).max, dtype=dtype).view(DTYPES[dtype]))
    large = st.integers(top - 63, top).flatmap(lambda x: st.sampled_from([x, x + 2 ** (size - 1)]))
    width = sum(band.width for band in bands)
    one = st.one_of(anything, large)
    return of_bits(draw(st.lists(one, min_size=width, max_size=width)), dtype), bands


@settings(deadline=None, max_examples=150)
@given(st.data())
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_every_finite_vector_comes_back_finite_and_near(dtype, data):
    y, bands = data.draw(any_components(dtype))
    codes, scales = encode_bands(y, bands)
    decoded = decode_bands(codes, scales, bands, raw_dtype=dtype)
    assert scales.isfinite().all() and decoded.isfinite().all()
    cast = narrow(decoded, dtype)
    assert cast.isfinite().all()
    start = column = index = 0
    for band in bands:
        if band.bits:
            x = y[start : start + band.width].double()
            got = decoded[column : column + band.width].double()
            out = cast[column : column + band.width].double()
            if band.bits == 16:
                assert torch.equal(out, x)
            else:
                # 8 bits: half a step, and the largest value is 2^-8 of itself beyond the last
                # code; 4 bits: the side on which the last code is 7 and values reach 8 steps.
                steps = 1.0 if band.bits == 8 else 1.04
                limit = scales[index].double().abs() * steps + TINY
                assert ((got - x).abs() <= limit).all()
                # The end of the dtype brings a value nearer, never further away.
                rounding = torch.finfo(dtype).eps * got.abs() + torch.finfo(dtype).smallest_normal
                assert ((out - x).abs() <= limit + rounding).all()
                index += 1
            column += band.width
        start += band.width


@pytest.mark.parametrize("value", [65_280.0, 65_504.0, -65_504.0])
@pytest.mark.parametrize("bits", [8, 4])
def test_float16_ends_where_it_ends(value, bits):
    y = torch.full((8,), value).half()
    decoded = narrow(decode_bands(*encode_bands(y, [Band(8, bits)]), [Band(8, bits)],
                                  raw_dtype=y.dtype), y.dtype)  # fmt: skip
    assert decoded.isfinite().all()
    assert ((decoded.float() - value).abs() <= 256).all()


def test_narrow_keeps_nan_and_ordinary_values():
    x = torch.tensor([float("nan"), 1.5, -65_504.0, 70_000.0, float("-inf")])
    assert str(narrow(x, torch.float16).tolist()) == "[nan, 1.5, -65504.0, 65504.0, -65504.0]"
