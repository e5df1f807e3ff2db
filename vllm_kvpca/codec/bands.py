"""Bands: runs of components that share one bit width and one scale per token.

A component vector y (length = sum of the widths) is stored band by band:

    16 bits   the values themselves, in the model's dtype, no scale
     8 bits   s = absmax(y_b) / 127, code = round(y_b / s) in [-127, 127], one int8 each
     4 bits   s = extreme(y_b) / -8, code = round(y_b / s) in [-8, 7], in two's complement;
              extreme is the component of largest magnitude with its sign, so s may be negative
              and all 16 codes are used. Byte j of a band of width w holds component j in its
              low and component j + w/2 in its high nibble, so that each half unpacks to a
              contiguous run
     0 bits   nothing; the components are dropped

The scale is rounded to bfloat16 before the codes are computed from it, so decoding uses
exactly the scale that encoding used.

What is decoded is finite for every finite input. Rounding a scale up can carry its largest
component past the end of the input's dtype (from 65,280 on in float16), and so does the error of
the others behind a rotation. Two limits keep that from becoming infinity, and neither changes a
byte or a value that an ordinary vector has: a scale is at most MAX_SCALE, so that products in
float32 are finite, and `narrow` ends at the largest value of the dtype it casts to. A smaller
scale where the dtype ends would not do: behind a basis the encoder does not know what the decoder
will cast to, and 4-bit errors reach further than a scale is rounded.

With codes in [-7, 7] and s = absmax / 7 the squared error of 64 Gaussian components is 29 % larger
(docs/results.md has what that costs); ggml's Q4_0 takes the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from vllm_kvpca.errors import LayoutError

SCALE_DTYPE = torch.bfloat16
SCALE_BYTES = 2
RAW_BITS = 16
RAW_BYTES = 2
QUANTIZED = (8, 4)
"""Bit widths whose bands have a scale."""
MAX_SCALE_BITS = {8: 0x7C01, 4: 0x7DFF}
"""The largest bfloat16, as its bits, whose product with a code (127, -8) is finite in float32."""
MAX_SCALE = {
    bits: torch.tensor(pattern, dtype=torch.int16).view(torch.bfloat16).item()
    for bits, pattern in MAX_SCALE_BITS.items()
}
WIDTH_STEP = 8
"""Band widths are multiples of this, which keeps every run of codes 4-byte aligned."""


@dataclass(frozen=True)
class Band:
    """`width` components stored with `bits` bits each.

    Raises:
        LayoutError: an unknown bit width, or a width that is no positive multiple of 8.
    """

    width: int
    bits: int

    def __post_init__(self) -> None:
        if self.bits not in (16, 8, 4, 0):
            raise LayoutError(f"a band of {self.bits} bits is not supported: use 16, 8, 4 or 0.")
        if self.width <= 0 or self.width % WIDTH_STEP:
            raise LayoutError(
                f"a band of {self.width} components is not supported: "
                f"use a positive multiple of {WIDTH_STEP}."
            )

    @property
    def code_bytes(self) -> int:
        """Bytes of codes per token and head."""
        return self.width * self.bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of scale per token and head."""
        return SCALE_BYTES if self.bits in QUANTIZED else 0


def resolve_bands(shares: Sequence[tuple[Fraction, int]], head_dim: int) -> tuple[Band, ...]:
    """Bands for one head dimension from shares of it, rounded to multiples of 8.

    The last band takes what rounding leaves, so widths always add up to `head_dim`.

    Raises:
        LayoutError: shares that do not add up to one, or a band rounded away.
    """
    if sum((share for share, _ in shares), Fraction(0)) != 1:
        raise LayoutError(f"the shares of the bands {list(shares)} must add up to 1.")
    if head_dim % WIDTH_STEP:
        raise LayoutError(f"head_dim {head_dim} is not a multiple of {WIDTH_STEP}.")
    widths = [round(share * head_dim / WIDTH_STEP) * WIDTH_STEP for share, _ in shares[:-1]]
    widths.append(head_dim - sum(widths))
    return tuple(Band(width, bits) for width, (_, bits) in zip(widths, shares, strict=True))


def code_bytes(bands: Sequence[Band]) -> int:
    """Bytes of codes per token and head over all bands."""
    return sum(band.code_bytes for band in bands)


def num_scales(bands: Sequence[Band]) -> int:
    """Scales per token and head over all bands."""
    return sum(band.bits in QUANTIZED for band in bands)


def stored_width(bands: Sequence[Band]) -> int:
    """Components that are stored at all: the width without the 0-bit bands."""
    return sum(band.width for band in bands if band.bits)


def encode_bands(y: torch.Tensor, bands: Sequence[Band]) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize components to codes and scales.

    Args:
        y: (..., components), any floating dtype; 16-bit bands are stored in this dtype,
            so in float32 they take 4 bytes a component and not the 2 of a page.
        bands: their widths add up to `components`.

    Returns:
        codes (..., code_bytes) uint8 and scales (..., num_scales) bfloat16.
    """
    codes: list[torch.Tensor] = []
    scales: list[torch.Tensor] = []
    start = 0
    for band in bands:
        part = y[..., start : start + band.width]
        start += band.width
        if band.bits == RAW_BITS:
            codes.append(part.contiguous().view(torch.uint8))
        elif band.bits:
            code, scale = _quantize(part.float(), band.bits)
            codes.append(code)
            scales.append(scale)
    empty = y.shape[:-1] + (0,)
    return (
        torch.cat(codes, -1) if codes else y.new_empty(empty, dtype=torch.uint8),
        torch.cat(scales, -1) if scales else y.new_empty(empty, dtype=SCALE_DTYPE),
    )


def _quantize(y: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    if bits == 8:
        scale = (y.abs().amax(-1, keepdim=True) / 127).to(SCALE_DTYPE).clamp_max_(MAX_SCALE[8])
        return _codes(y, scale, -127, 127).view(torch.uint8), scale
    most, least = y.amax(-1, keepdim=True), y.amin(-1, keepdim=True)
    extreme = torch.where(most > -least, most, least)
    scale = (extreme * -0.125).to(SCALE_DTYPE).clamp_(-MAX_SCALE[4], MAX_SCALE[4])
    scale = torch.where(scale == 0, torch.zeros_like(scale), scale)  # no -0: bits are compared
    low, high = _codes(y, scale, -8, 7).view(torch.uint8).chunk(2, -1)
    return (low & 15) | (high << 4), scale


def _codes(y: torch.Tensor, scale: torch.Tensor, low: int, high: int) -> torch.Tensor:
    # A zero vector has scale 0; dividing by 1 instead gives the codes 0 it needs.
    divisor = torch.where(scale == 0, torch.ones_like(scale), scale).float()
    return (y / divisor).round_().clamp_(low, high).to(torch.int8)


def narrow(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A copy in `dtype` that ends at its largest value instead of in infinity; NaN stays NaN."""
    most = torch.finfo(dtype).max
    return x.clamp(-most, most).to(dtype)


def signed_nibbles(codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the low and of the high nibbles of uint8 codes, as int8."""
    return (codes << 4).view(torch.int8) >> 4, codes.view(torch.int8) >> 4


def decode_bands(
    codes: torch.Tensor,
    scales: torch.Tensor,
    bands: Sequence[Band],
    *,
    raw_dtype: torch.dtype,
) -> torch.Tensor:
    """Components from codes and scales; dropped components are left out.

    Args:
        codes: (..., code_bytes) uint8.
        scales: (..., num_scales) bfloat16.
        raw_dtype: dtype of the 16-bit bands.

    Returns:
        (..., stored_width) components in float32; see `narrow` for a cast to less.
    """
    shape = (*codes.shape[:-1], stored_width(bands))
    out = torch.empty(shape, dtype=torch.float32, device=codes.device)
    byte = column = index = 0
    for band in bands:
        size = band.width * raw_dtype.itemsize if band.bits == RAW_BITS else band.code_bytes
        part = codes[..., byte : byte + size]
        target = out[..., column : column + band.width]
        if band.bits == RAW_BITS:
            target.copy_(part.contiguous().view(raw_dtype))
        elif band.bits:
            scale = scales[..., index : index + 1].float()
            if band.bits == 8:
                torch.mul(part.view(torch.int8), scale, out=target)
            else:
                for nibbles, run in zip(signed_nibbles(part), target.chunk(2, -1), strict=True):
                    torch.mul(nibbles, scale, out=run)
            index += 1
        byte += size
        column += band.width if band.bits else 0
    return out
