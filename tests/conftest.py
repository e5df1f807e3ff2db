"""Without a GPU, Triton's kernels run under its interpreter.

Triton decides that when a kernel is decorated, its own library's when `triton` is first
imported, and that may be anybody's import (transformers does it). So the kernels are
imported here, before any test module. The variable is taken back, or every engine that a
test starts would inherit it; tests/kernels sets it again while its tests run.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

KERNELS = ("starts.kernel", "store.kernel", "archive.kernel", "expand.kernel", "attend.decode")


def import_interpreted() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in KERNELS:
            module = f"vllm_kvpca.ops.{name}"
            if importlib.util.find_spec(module):
                importlib.import_module(module)


if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    import_interpreted()
