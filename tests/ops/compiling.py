"""Compile kernels for a GPU that is not there.

A test module holds a function, say `launches`, that calls the kernels' host functions with
tensors on the CPU. `compile_in_subprocess(__file__, "launches", 90)` imports that module in
a process of its own without Triton's interpreter (the kernels of this process were decorated
for it) and calls the function: each launch then compiles for compute capability 9.0, as
Triton itself would there (same specialization of arguments), and runs nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

HERE = Path(__file__).parent
CAPABILITIES = (80, 90, 100)
SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory that a program may use on every GPU from sm_80 on (sm_86, sm_89)."""


@dataclass(frozen=True)
class Compiled:
    """What one launch compiled to; `shared` in bytes per program, `hash` of all that went in."""

    name: str
    shared: int
    cubin_bytes: int
    hash: str
    ptx: str = ""


class _AbsentGpu:
    """The part of a Triton driver that compiling asks."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compile_only(capability: int) -> Iterator[list[Compiled]]:
    """Launches inside the block compile for `capability` and are listed, not run."""
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Compiled] = []

    def launcher(kernel, grid):
        def launch(*args, **kwargs):
            result = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            if hasattr(result, "result"):  # compiled by a pool of threads
                result = result.result()
            asm = result.asm
            name = result.metadata.name
            sizes = result.metadata.shared, len(asm["cubin"])
            compiled.append(Compiled(name, *sizes, result.hash, asm["ptx"]))

        return launch

    driver.set_active(_AbsentGpu(capability))  # for good: without a GPU there is none to go back to
    with mock.patch.object(JITFunction, "__getitem__", launcher):
        yield compiled


def compile_in_subprocess(path: str, function: str, capability: int) -> list[Compiled]:
    """The launches of `function` in the module at `path`, compiled (without their PTX)."""
    variables = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join(map(str, [HERE.parents[1], HERE]))
    command = [sys.executable, __file__, path, function, str(capability)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = [Compiled(**line) for line in json.loads(done.stdout.splitlines()[-1])]
    assert compiled, f"{function} launched nothing"
    for kernel in compiled:
        assert kernel.shared <= SHARED_LIMIT, kernel
    return compiled


def main(path: str, function: str, capability: str) -> None:
    spec = importlib.util.spec_from_file_location("launching", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with compile_only(int(capability)) as compiled:
        getattr(module, function)()
    print(json.dumps([{**asdict(kernel), "ptx": ""} for kernel in compiled]))


if __name__ == "__main__":
    main(*sys.argv[1:])
