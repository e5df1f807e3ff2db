"""Without a GPU, Triton's kernels run under its interpreter.

Triton decides that when a kernel is decorated, its own library's when `triton` is first
imported, and that may be anybody's import (transformers does it). So the kernels are
imported here, before any test module. The variable is taken back, or every engine that a
test starts would inherit it; tests/ops sets it again while its tests run.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

EACH_VLLM = (
    "deploy/test_newer_vllm.py",
    "e2e/test_each_vllm.py",
    "e2e/test_refusals.py",
    "serving/test_attach.py",
    "serving/test_cache_stats.py",
    "serving/test_doctor.py",
    "serving/test_endpoint.py",
    "serving/test_engine_config.py",
    "serving/test_groups.py",
    "serving/test_room.py",
    "serving/test_measuring.py",
    "serving/test_options.py",
    "serving/test_platform.py",
    "serving/test_prefix_hits.py",
    "serving/test_register.py",
)
"""The tests that stand on vLLM's inside: marked each_vllm, they run with every tested version.
Single tests of other files are marked where they are."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_each_vllm(items)
    leave_out_gpu(config, items)


def leave_out_gpu(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What needs a GPU is deselected where there is none, not skipped: nobody counts it."""
    if not torch.cuda.is_available():
        needing = [item for item in items if item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=needing)
        items[:] = [item for item in items if item not in needing]


def mark_each_vllm(items: list[pytest.Item]) -> None:
    chosen = {Path(__file__).parent / name for name in EACH_VLLM}
    missing = [path for path in chosen if not path.exists()]
    assert not missing, f"EACH_VLLM names what is gone: {missing}"
    for item in items:
        if item.path in chosen:
            item.add_marker(pytest.mark.each_vllm)


KERNELS = ("locate.kernel", "store.kernel", "archive.kernel", "expand.kernel", "attend.kernel")


def import_interpreted() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for name in KERNELS:
            module = f"vllm_kvpca.ops.{name}"
            if importlib.util.find_spec(module):
                importlib.import_module(module)


# Thousands of small operations are faster without threads that wait for each other.
torch.set_num_threads(1)
if "PYTEST_XDIST_WORKER" in os.environ:
    # Two engines at a time: vLLM would bind the threads of both to the same cores.
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    import_interpreted()
