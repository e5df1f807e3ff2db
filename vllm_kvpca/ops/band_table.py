"""Bands as the plain integers that Triton kernels unroll over, and where their codes lie."""
# Triton reads annotations of kernel parameters, so only tl.constexpr is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl

from vllm_kvpca.codec.bands import QUANTIZED, Band
from vllm_kvpca.pages.layout import TOGETHER, ArchiveLayout, Region

BandRow = tuple[int, int, int, int, int]
"""(bits, width, first component, first code byte of the token, index of the scale)."""


def band_table(bands: Sequence[Band]) -> tuple[BandRow, ...]:
    """One row for each band; the scale's index of a band without a scale is not used."""
    rows = []
    column = byte = scale = 0
    for band in bands:
        rows.append((band.bits, band.width, column, byte, scale))
        column += band.width
        byte += band.code_bytes
        scale += band.bits in QUANTIZED
    return tuple(rows)


@lru_cache(64)
def layout_constants(layout: ArchiveLayout) -> dict[str, object]:
    """Keyword arguments (all tl.constexpr) of a kernel that touches archive pages; kept, because
    every layer asks in every step."""
    return {
        "K_CODES": (*_region(layout.k_codes), 1),
        "K_SCALES": _region(layout.k_scales),
        "K_BANDS": band_table(layout.k_bands),
        "V_CODES": (*_region(layout.v_codes), TOGETHER),
        "V_SCALES": _region(layout.v_scales),
        "V_BANDS": band_table(layout.v_bands),
        "ARCHIVE_BLOCK": layout.block_size,
    }


@triton.jit
def code_rows(page, token, CODES: tl.constexpr, BYTE: tl.constexpr, kind: tl.constexpr):
    """Pointers of type `kind` to a band's first code of each token; the next is CODES[2] further.

    Args:
        page: (tokens,) pointers to the head's part of each token's page. token: in the block.
        CODES: (offset, width, tokens that lie together) of the region. BYTE: the band's first.
    """
    together: tl.constexpr = CODES[2]
    size: tl.constexpr = kind.primitive_bitwidth // 8
    row = token // together * (together * CODES[1]) + BYTE * together + token % together * size
    return (page + CODES[0] + row).to(tl.pointer_type(kind))


@triton.jit
def turned_bias(bias, rows, HEAD_DIM: tl.constexpr):
    """What is taken out of K and given back (codec.key_bias), channels `rows` of a head.

    Args:
        bias: (slow, angles): the head's row of BiasTables.slow, and pointers (tokens,) to the rows
            of BiasTables.angles of the tokens' runs.

    Returns:
        (tokens, channels) float32; channels past the head are 0.
    """
    slow, angles = bias
    half: tl.constexpr = HEAD_DIM // 2
    exists = rows < HEAD_DIM
    is_first = rows < half
    pair = tl.where(is_first, rows, rows - half)
    own = tl.load(slow + rows, exists, other=0.0)
    other = tl.load(slow + tl.where(is_first, rows + half, rows - half), exists, other=0.0)
    cos = tl.load(angles[:, None] + pair[None, :], exists[None, :], other=0.0)
    sin = tl.load(angles[:, None] + half + pair[None, :], exists[None, :], other=0.0)
    return own[None, :] * cos + tl.where(is_first, -other, other)[None, :] * sin


def _region(region: Region) -> tuple[int, int]:
    return region.offset, region.width


def check_last_dim(**tensors: object) -> None:
    """Kernels take any outer strides, but read and write rows of contiguous elements.

    Raises:
        ValueError: a tensor whose last dimension is not contiguous.
    """
    for name, tensor in tensors.items():
        if tensor.stride(-1) != 1:  # type: ignore[attr-defined]
            raise ValueError(f"the last dimension of {name} must be contiguous.")


def checked_basis(basis: torch.Tensor | None) -> torch.Tensor | None:
    """The basis, if it is as the kernels read it: rows of contiguous float32.

    Raises:
        ValueError: it is not.
    """
    if basis is not None and not (basis.is_contiguous() and basis.dtype == torch.float32):
        raise ValueError("a basis must be contiguous float32.")
    return basis
