"""Numbers in the shape that a tensor core wants, inside Triton kernels.

Integer products run on int8 operands, so codes go into them as they are:

    int8      as stored
    nibbles   16 times the value: the byte's upper four bits in place, the lower four shifted
              there; one shift and two logic operations for the eight codes of a register

The other operand (queries, weights) is int8 in two terms, x = hi + lo / HI with |hi|, |lo|
up to 127, which keeps 15 bits of it. A matrix instruction has 16 rows: up to 8 query heads
put hi into rows 0-7 and lo into rows 8-15, so that the second term is free; more heads take
two products.
"""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HI = tl.constexpr(254)
LEVELS = tl.constexpr(127.0)
"""Largest hi."""
NIBBLE_UNIT = tl.constexpr(16)
_ROUNDING = tl.constexpr(12582912.0)
"""1.5 * 2^23: a float32 sum with it has no room for a fraction, and its low byte is the
integer's. One addition each way instead of a slow conversion."""

_NIBBLES = tl.constexpr("""{
    .reg .b32 a;
    shl.b32 a, $2, 4;
    and.b32 $0, a, 0xF0F0F0F0;
    and.b32 $1, $2, 0xF0F0F0F0;
}""")


@triton.jit
def nibbles(codes, INTERPRET: tl.constexpr):
    """NIBBLE_UNIT times the values of the low and of the high nibbles: two int8 tensors."""
    if INTERPRET:
        low = ((codes & 15) << 4).to(tl.int8, bitcast=True)
        high = (codes & 240).to(tl.int8, bitcast=True)
    else:  # outputs are early-clobber: $0 is written before $2 is read for the last time
        low, high = tl.inline_asm_elementwise(
            _NIBBLES, "=&r,=&r,r", [codes], dtype=(tl.int8, tl.int8), is_pure=True, pack=4
        )
    return low, high


@triton.jit
def two_terms(x):
    """(hi, lo) int8 of numbers in [-LEVELS, LEVELS]."""
    rounded = x + _ROUNDING
    rest = (x - (rounded - _ROUNDING)) * HI + _ROUNDING
    hi = rounded.to(tl.int32, bitcast=True).to(tl.int8)
    return hi, rest.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def stacked(hi, lo):
    """(8, n) twice: (16, n), within each thread. Not by tl.join, which Triton takes as a sign
    of operands narrower than these, and then loads codes byte by byte."""
    first = (tl.arange(0, 2) == 0)[:, None, None]
    return tl.reshape(tl.where(first, hi[None, :, :], lo[None, :, :]), (16, hi.shape[1]))


@triton.jit
def int_product(terms, codes, ROWS: tl.constexpr):
    """(ROWS, n) float32: HI times the product of two-term rows with int8 codes (k, n).

    Args:
        terms: (hi, lo), each (16, k); with 8 rows both are the same stacked tensor.
    """
    s = tl.dot(terms[0], codes, out_dtype=tl.int32)
    if ROWS == 8:
        s = fold(s * tl.where(tl.arange(0, 16) < 8, HI, 1)[:, None], ROWS)
    else:
        s = s * HI + tl.dot(terms[1], codes, out_dtype=tl.int32)
    return s.to(tl.float32)


@triton.jit
def product_order(x, TILE: tl.constexpr):
    """The tokens of a product's columns, in order, if its columns were `permuted_tokens`."""
    x = tl.reshape(x, (x.shape[0], TILE // 16, 2, 4, 2))
    return tl.reshape(tl.permute(x, (0, 1, 3, 2, 4)), (x.shape[0], TILE))


@triton.jit
def permuted_tokens(TILE: tl.constexpr):
    """The token of each column in a product with K, so that the weights that follow from it
    are already where the product with V wants them.

    A thread holds columns 8 j + 2 i + b of an int32 product (i is the thread, b is 0 or 1) and
    must hold columns 16 j + 4 i + 0..3 of the int8 operand of the next product. In logic
    operations, because Triton 3.6 takes a sum like this for a multiple of 2.
    """
    column = tl.arange(0, TILE)
    return (column & -16) | ((column << 1) & 12) | ((column >> 2) & 2) | (column & 1)


@triton.jit
def fold(x, ROWS: tl.constexpr):
    """Sums of the two halves of (16, n): (8, n), within each thread."""
    if ROWS == 16:
        return x
    else:
        return tl.sum(tl.reshape(x, (2, 8, x.shape[1])), 0)


@triton.jit
def unfold(x, ROWS: tl.constexpr):
    """(8, n) twice: (16, n), within each thread."""
    if ROWS == 16:
        return x
    else:
        twice = tl.broadcast_to(x[None, :, :], (2, 8, x.shape[1]))
        return tl.reshape(twice, (16, x.shape[1]))


@triton.jit
def capped(scores, soft_cap, HAS_CAP: tl.constexpr):
    """Scores in base-2 units. With a soft cap they arrive in natural units and become
    soft_cap * tanh(scores / soft_cap) first, by 2^x, which saturates to the right limits."""
    if HAS_CAP:
        power = tl.exp2(scores * (2 * LOG2E / soft_cap))
        return (soft_cap - 2 * soft_cap / (1 + power)) * LOG2E
    else:
        return scores


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
