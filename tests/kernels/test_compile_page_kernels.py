"""Store, archive and gather compile for the GPUs we name; see compiling.py."""

from __future__ import annotations

import pytest
import torch
from compiling import CAPABILITIES, compile_in_subprocess
from kernel_cases import make_codec, make_table, random_tokens

from vllm_kvpca.codec.policy import Policy

pytest.importorskip("triton")

Shapes = list[tuple[str, int, torch.dtype]]

SHAPES: Shapes = [
    ("kv-mixed", 96, torch.bfloat16),
    ("plain-mixed", 64, torch.float16),
]
"""Every kind of band, with and without a basis, in both dtypes."""
MORE_SHAPES: Shapes = [
    ("v-mixed", 256, torch.bfloat16),  # the most registers and shared memory
    ("k8v4", 128, torch.bfloat16),
]


def launches() -> None:
    launch(SHAPES)


def more_launches() -> None:
    launch(MORE_SHAPES)


def launch(shapes: Shapes) -> None:
    """Every kernel, with small tensors."""
    from vllm_kvpca.kernels.archive import archive, archive_decode
    from vllm_kvpca.kernels.gather import gather, gather_recent
    from vllm_kvpca.kernels.store import store

    heads, index = 2, torch.arange(8)
    for name, head_dim, dtype in shapes:
        codec = make_codec(name, head_dim, heads, dtype)
        pages = torch.zeros(4, heads, codec.layout.head_bytes, dtype=torch.uint8)
        recent = torch.zeros(4, heads, 32, 2 * head_dim, dtype=dtype)
        key, value = random_tokens(8, heads, head_dim, dtype)
        archive(pages, recent, key, value, index[:5], index[:3], index, codec)
        tables = make_table([2, 1]), make_table([1, 2])
        lengths = starts = torch.ones(2, dtype=torch.int32)
        policy = Policy(128, 64, 48)
        archive_decode(pages, recent, key, value, *tables, lengths, starts, policy, codec)
        out_k, out_v = torch.zeros(2, 8, heads, head_dim, dtype=dtype)
        gather(pages, tables[1], starts, lengths, starts, 64, out_k, out_v, codec)
        store(recent, key, value, index)
        gather_recent(recent, tables[0], starts, lengths, starts, 64, out_k, out_v)


@pytest.mark.parametrize(
    "function, capability",
    [*(("launches", capability) for capability in CAPABILITIES), ("more_launches", 90)],
)
def test_kernels_compile(function, capability):
    names = {kernel.name for kernel in compile_in_subprocess(__file__, function, capability)}
    assert names == {
        "_store_kernel",
        "_archive_kernel",
        "_archive_decode_kernel",
        "_gather_kernel",
        "_gather_recent_kernel",
    }
