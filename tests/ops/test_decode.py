"""The decode kernels against their reference, and compiled for the GPUs we name.

Without a GPU they run in Triton's interpreter, where inline assembly and bfloat16 dot products do
not: the kernels then use plain operations in float32. On a GPU the same tests run them as they are,
and more of them.
"""

from __future__ import annotations

import pytest
import torch
from compiling import CAPABILITIES, compile_in_subprocess

pytest.importorskip("triton")
from decode_cases import FORMATS, make_case

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.ops.attend.pieces import MAX_GROUP, check_tiles, row_count

# (start, recent) of each sequence; None is a row of padding.
MIXED = ([0, 0, 96, 144, 0], [0, 17, 0, 63, None])
SINGLE = ([0, 0, 0, 0, 0], [0, 15, 16, 62, 999])
ARCHIVED = ([16, 48, 1008], [0, 0, 0])
LARGE = ([0, 0, 144, 480, 1200, 0, 4032], [0, 63, 0, 17, 1000, None, 16])

CASES = {
    **{f"{f}-64": (f, 64, 7, "float16", None, *MIXED) for f in FORMATS},
    **{f"{f}-{d}": (f, d, 3, "float16", None, [96], [5]) for f in FORMATS for d in (96, 128, 256)},
    **{f"{f}-bf16": (f, 64, 4, "bfloat16", None, [96], [17]) for f in FORMATS},
    **{f"group-{g}": ("k8v4", 64, g, "float16", None, *MIXED) for g in (1, 3, 8, 9, 16)},
    **{f"cap-{f}": (f, 64, 2, "float16", 5.0, [96], [17]) for f in FORMATS},
    "recent-only": ("k8v4", 64, 2, "float16", None, *SINGLE),
    "archive-only": ("k8v4", 64, 2, "float16", None, *ARCHIVED),
    "many-sequences": ("kv-mixed", 64, 2, "float16", None, [48] * 17, [1] * 17),
    "padding-only": ("k8v4", 64, 2, "float16", None, [0, 0], [None, None]),
}
ON_GPU = {
    f"{f}-{d}-{g}-{t}-{cap}": (f, d, g, t, cap, *LARGE)
    for f in FORMATS
    for d, groups in ((64, (7,)), (96, (7,)), (128, (1, 3, 7, 8, 16)), (256, (7,)))
    for g in groups
    for t in ("bfloat16", "float16")
    for cap in ((None, 5.0) if g == 7 else (None,))
}

# The output is rounded to its dtype: 2^-11 (float16) or 2^-8 at most (the interpreter
# truncates bfloat16), a third of that in the RMS. The query in two int8 terms adds 2^-16 of
# its largest component, raised by the scores' size: below 1e-4 here.
LIMIT = {"float16": 5e-4, "bfloat16": 4e-3}


@pytest.mark.parametrize("name", list(CASES))
def test_matches_the_reference(name, device):
    """Pages and buffers hold NaN wherever nothing was written; NaN fails the comparison."""
    form, dim, group, dtype, cap, starts, recents = CASES[name]
    case = make_case(form, dim, group, starts, recents, getattr(torch, dtype), device, cap=cap)
    assert case.error() < LIMIT[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(ON_GPU))
def test_matches_the_reference_at_length(name, device):
    form, dim, group, dtype, cap, starts, recents = ON_GPU[name]
    case = make_case(form, dim, group, starts, recents, getattr(torch, dtype), device, cap=cap)
    assert case.error() < LIMIT[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_a_sequence_of_131072_tokens(form, device):
    case = make_case(form, 128, 7, [131040], [31], torch.bfloat16, device, kv_heads=4)
    assert case.error() < LIMIT["bfloat16"]


def launches() -> None:
    """One step; only compiled."""
    make_case("k8v4", 128, 7, [96], [17], torch.bfloat16, "cpu").run()


def biased_launches() -> None:
    """The same with K that is archived without its bias."""
    make_case("kb-mixed", 128, 7, [96], [17], torch.bfloat16, "cpu").run()


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_compiles(capability):
    names = {kernel.name for kernel in compile_in_subprocess(__file__, "launches", capability)}
    assert names == {"chunks_kernel", "split_kernel", "merge_kernel"}


def test_compiles_with_a_bias():
    kernels = compile_in_subprocess(__file__, "biased_launches", CAPABILITIES[1])
    assert {kernel.name for kernel in kernels} == {
        *("chunks_kernel", "rotate_kernel", "split_kernel", "merge_kernel"),
    }


def test_blocks_smaller_than_a_tile_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedError, match="--block-size 32 or more"):
        check_tiles(16, 32)


def test_too_many_query_heads_are_refused_with_the_way_out():
    with pytest.raises(UnsupportedError, match="without --kv-compression-preset"):
        row_count(MAX_GROUP + 1)
