"""The cast of kernels' float32 results: to the dtype's largest value, not to infinity."""
# Triton reads annotations of kernel parameters, so only tl.constexpr is annotated.
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, kind: tl.constexpr):
    """codec.bands.narrow: float32 x in float16 or bfloat16; NaN stays NaN."""
    most: tl.constexpr = 65504.0 if kind == tl.float16 else 3.3895313892515355e38
    return tl.clamp(x, -most, most, propagate_nan=tl.PropagateNan.ALL).to(kind)
