"""Programmatic dependent launch: a kernel is put on the GPU while the one before it still runs.

A decode step launches four short kernels in every layer. Each waits, before it reads anything that
the one before may write, until that one has ended (`wait_for_previous`), and lets the next one be
launched (`launch_next`). What a launch costs then passes while another kernel runs. Kernels of
others do not take part, and nothing changes for them: they wait for all of ours as ever.

Source: CUDA C++ Programming Guide, programmatic dependent launch; PTX ISA, griddepcontrol.
"""

# mypy: ignore-errors
# Triton compiles these functions; their arguments are its own types, not Python's.

from __future__ import annotations

import os
from functools import cache

import triton
import triton.language as tl

LEAST_CAPABILITY = 90
"""Compute capability, times ten, from which GPUs can do it (Hopper)."""


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, which knows no inline assembly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def overlaps() -> bool:
    """Whether the GPU that Triton launches on takes part."""
    if interpreted():
        return False
    target = triton.runtime.driver.active.get_current_target()
    return target.backend == "cuda" and target.arch >= LEAST_CAPABILITY


def launch_options(overlap: bool) -> dict[str, bool]:
    """Of a kernel that waits for the one before by itself."""
    return {"launch_pdl": True} if overlap else {}


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """Nothing that the kernel before writes may be read before this."""
    if OVERLAP:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_next(OVERLAP: tl.constexpr):
    """Let the next kernel be launched, once every program has come here or has ended.

    After `wait_for_previous`: the next one may then read, before it waits itself, whatever was
    written before this kernel.
    """
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def follow_previous(OVERLAP: tl.constexpr):
    """Both, as short kernels begin."""
    wait_for_previous(OVERLAP)
    launch_next(OVERLAP)
