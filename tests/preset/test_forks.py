"""Presets load before and after a fork: vLLM's `LLM` forks its engine by default."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PRESET = "HuggingFaceTB--SmolLM2-135M-Instruct/k5.5v5.5"
SCRIPT = """
import os, sys
import torch
from vllm_kvpca.preset import load_preset

def use():
    preset = load_preset(sys.argv[1])
    preset.basis("k", 0, list(range(3)) * 8, 64)
    load_preset("k8v4").basis("v", 0, list(range(64)), 64)

if "parallel" in sys.argv:
    torch.ones(1 << 22).exp()  # OpenMP's threads are there now
use()
child = os.fork()
if not child:
    use()
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""


def run(*arguments: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT, PRESET, *arguments]
    return subprocess.run(command, env=environment, timeout=60).returncode


def test_an_engine_forked_after_a_preset_was_loaded_can_load_it_too():
    assert run() == 0


def test_and_also_where_the_parent_has_used_threads_itself():
    assert run("parallel") == 0
