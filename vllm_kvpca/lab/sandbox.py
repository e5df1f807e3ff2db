"""Runs code that a model wrote: no network, no process, no file, and limits on time and memory.

Each program gets a Python of its own (standard library only), an empty folder and an empty
environment. That Python installs a seccomp filter before it looks at the program (Linux,
Documentation/userspace-api/seccomp_filter.rst): of the kernel it can ask for memory, the time, and
files to read. It needs no privilege and works in containers; where it does not, nothing is run.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any

from vllm_kvpca.errors import SetupError

_INSIDE = Path(__file__).with_name("sandboxed.py")
_NEEDS = "generated code is run on x86-64 Linux with seccomp only."
PASSED, FAILED, TIMED_OUT, CRASHED = "passed", "failed", "timed out", "crashed"


@dataclass(frozen=True)
class Limits:
    """What one program may take.

    Attributes:
        cpu_seconds, wall_seconds: whichever is over first; a program that sleeps uses no CPU.
        memory_mib: address space, the interpreter's own included.
        file_kib: what it may write to the one file it has, its report.
    """

    cpu_seconds: int = 5
    wall_seconds: float = 20
    memory_mib: int = 1024
    file_kib: int = 64


LIMITS = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `result` is PASSED, FAILED, TIMED_OUT or CRASHED.

    PASSED means that its last line was run: leaving early is a failure.
    """

    result: str
    reason: str = ""


def isolation(limits: Limits = LIMITS) -> dict[str, Any]:
    """What is in force, for the record; tried out with an empty program.

    Raises:
        SetupError: nothing can be shut in on this machine, so no generated code is run.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise SetupError(
            f"no sandbox on {sys.platform} on {platform.machine()}: {_NEEDS} Measure on such a "
            "machine."
        )
    outcome = run("", limits)
    if outcome.result != PASSED:
        raise SetupError(
            f"no sandbox here ({outcome.result}: {outcome.reason}): {_NEEDS} A container may "
            "have to allow it."
        )
    return {"filter": "seccomp", "files": "read only", "processes": 0, "network": False} | asdict(
        limits
    )


def run(program: str, limits: Limits = LIMITS) -> Outcome:
    """Run a Python program to its end, or until a limit stops it."""
    word = secrets.token_hex(16)
    given = {
        "program": program,
        "word": word,
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_mib << 20,
        "file_bytes": limits.file_kib << 10,
    }
    # The interpreter itself, not the environment's: -I and -S keep packages out.
    command = [os.path.realpath(sys.executable), "-I", "-S", "-X", "utf8", "-c", _source()]
    with TemporaryDirectory() as folder, TemporaryFile() as report:
        try:
            ended = subprocess.run(
                command,
                input=json.dumps(given).encode(),
                stdout=report,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                timeout=limits.wall_seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(TIMED_OUT, f"{limits.wall_seconds:g} s")
        report.seek(0)
        return _outcome(ended.returncode, report.read(limits.file_kib << 10), word, limits)


def run_all(
    programs: Sequence[str], limits: Limits = LIMITS, after_each: Callable[[], None] = lambda: None
) -> list[Outcome]:
    """Run programs side by side, one for each core."""

    def one(program: str) -> Outcome:
        outcome = run(program, limits)
        after_each()
        return outcome

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(one, programs))


def _source() -> str:
    return _INSIDE.read_text(encoding="utf-8")


def _outcome(code: int, report: bytes, word: str, limits: Limits) -> Outcome:
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome(TIMED_OUT, f"{limits.cpu_seconds} s of CPU time")
    lines = report.splitlines()
    try:
        said = json.loads(lines[-1]) if lines else {}
    except ValueError:  # the program wrote into its report
        said = {}
    if not isinstance(said, dict):
        said = {}
    if said.get("passed") == word:
        return Outcome(PASSED)
    if code < 0:
        return Outcome(CRASHED, signal.Signals(-code).name)
    if "failed" in said:
        return Outcome(FAILED, str(said["failed"]))
    return Outcome(CRASHED, str(said.get("refused", f"exit code {code}, nothing said")))
