"""Tensor work that is safe before and after a fork.

vLLM's `LLM` forks its engine from a process that has loaded the preset, and the engine loads it
again. Threads do not survive a fork: a parallel loop of OpenMP in the child waits for ever for
those that the parent had (https://pytorch.org/docs/stable/notes/multiprocessing.html, "Poison
fork"). One thread needs no others, and leaves none behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's operations on the CPU in the calling thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
