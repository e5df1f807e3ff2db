"""Codes to numbers, inside Triton kernels.

A tensor core wants bfloat16 or int8 operands; converting integers with the conversion unit
costs four times an ordinary instruction. These functions put the code's bits into the
mantissa of a constant instead and take the constant off again; every step is exact:

    nibble n    bits of 128.0 | n = 128 + n, minus 136 = n - 8
    int8 x      bits of 128.0 | (x & 127), minus 128 if x >= 0, else 256 = x

(128 + n fits bfloat16's seven mantissa bits; the 256 is 128 with x's sign bit added to the
exponent.) Four bytes arrive in one register and leave as pairs: two byte permutes, and for
each pair a shift (high nibbles), one or two logic operations and one fused multiply-add.
Outputs are early-clobber: the first is written before the input is read for the last time.
"""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

_NIBBLES = tl.constexpr("""{
    .reg .b32 a, b, x, one, low;
    mov.b32 one, 0x3F803F80;
    mov.b32 low, 0xC308C308;
    prmt.b32 a, $4, 0, 0x4140;
    prmt.b32 b, $4, 0, 0x4342;
    lop3.b32 x, a, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $0, x, one, low;
    lop3.b32 x, b, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $1, x, one, low;
    shr.u32 a, a, 4;
    shr.u32 b, b, 4;
    lop3.b32 x, a, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $2, x, one, low;
    lop3.b32 x, b, 0x000F000F, 0x43004300, 0xEA;
    fma.rn.bf16x2 $3, x, one, low;
}""")

_INT8 = tl.constexpr("""{
    .reg .b32 a, x, y, one;
    mov.b32 one, 0x3F803F80;
    prmt.b32 a, $2, 0, 0x4140;
    lop3.b32 x, a, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 y, a, 0x00800080, 0xC300C300, 0xEA;
    fma.rn.bf16x2 $0, x, one, y;
    prmt.b32 a, $2, 0, 0x4342;
    lop3.b32 x, a, 0x007F007F, 0x43004300, 0xEA;
    lop3.b32 y, a, 0x00800080, 0xC300C300, 0xEA;
    fma.rn.bf16x2 $1, x, one, y;
}""")


@triton.jit
def nibbles(codes, INTERPRET: tl.constexpr):
    """Values of the low and of the high nibbles of uint8 codes: two tensors, -8 to 7."""
    if INTERPRET:
        low = (codes & 15).to(tl.float32) - 8
        high = (codes >> 4).to(tl.float32) - 8
    else:
        low, high = tl.inline_asm_elementwise(
            _NIBBLES,
            "=&r,=&r,=&r,=&r,r",
            [codes],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=4,
        )
    return low, high


@triton.jit
def int8_values(codes, INTERPRET: tl.constexpr):
    """Values of uint8 codes that hold int8 numbers."""
    if INTERPRET:
        values = codes.to(tl.int8, bitcast=True).to(tl.float32)
    else:
        values = tl.inline_asm_elementwise(
            _INT8, "=&r,=&r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    return values


@triton.jit
def fold(x, ROWS: tl.constexpr):
    """Sums of the two halves of (16, tokens): (8, tokens), within each thread."""
    if ROWS == 16:
        return x
    else:
        return tl.sum(tl.reshape(x, (2, 8, x.shape[1])), 0)


@triton.jit
def unfold(x, ROWS: tl.constexpr):
    """(8, tokens) twice: (16, tokens), within each thread."""
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
