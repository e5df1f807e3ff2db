"""Linear algebra on the CPU in the calling thread alone, where threads would hang.

PyTorch's matrix decompositions of a stack (linalg.inv, solve, eigh, ...) run the matrices in
parallel, and each again in parallel within MKL. Once torch.set_num_threads was called, by whomever
in the process, MKL no longer notices that it is inside a parallel region and waits for ever for
threads it does not get: with two threads and matrices of 256 x 256 every time.

And threads do not survive a fork: a parallel loop of OpenMP in the child waits for ever for those
that the parent had (https://pytorch.org/docs/stable/notes/multiprocessing.html, "Poison fork").
vLLM's `LLM` forks its engine from a process that has loaded the preset, and the engine loads it
again. One thread needs no others, and leaves none behind.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch's operations on the CPU in the calling thread alone; a decorator, too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
