"""Linear algebra of a stack of matrices in a process where somebody has set the threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
torch.set_num_threads(1)
torch.set_num_threads(2)  # as vLLM's CPU workers do, and as a preset being loaded does
from vllm_kvpca.codec.basis import balanced_basis, condition, encoder, pca_basis

torch.manual_seed(0)
x = torch.randn(3, 512, 256, dtype=torch.float64)
moments = x.mT @ x
stretched = torch.randn(3, 256, 256) @ torch.logspace(-0.5, 0.5, 256).diag()

def off(product):
    return (product - torch.eye(256)).abs().max()

for _ in range(5):
    {work}
"""
WORK = {
    "encoder": "e = encoder(stretched); assert off(e.mT @ stretched) < 0.1",
    "condition": "assert 1 < condition(stretched) < 1e9",
    "pca_basis": "b = pca_basis(moments); assert off(b.mT @ b) < 1e-5",
    "balanced_basis": "assert balanced_basis(moments, moments.flip(-1, -2)).isfinite().all()",
}


@pytest.mark.parametrize("name", WORK)
def test_a_stack_of_matrices_is_done_in_seconds(name):
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT.format(work=WORK[name])]
    assert subprocess.run(command, env=environment, timeout=90).returncode == 0
