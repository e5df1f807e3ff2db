"""The program that runs inside the sandbox; lab.sandbox hands its source to a Python of its own.

Standard library only, and nothing of this package: it shuts itself in, then runs what it was
given. What it allows is a list, so whatever a later kernel adds is refused, too.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import struct
import sys
import types

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
AUDIT_ARCH_X86_64 = 0xC000003E
ALLOW, REFUSE, KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
LOAD, IF_EQUAL, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# System calls of x86-64 by number: to compute, to read files, and to write what is open already.
# Not among them: anything with sockets, processes, other processes' memory, signals to others, or
# names of files that would be made, changed or removed.
COMPUTE = {
    **{"mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "mremap": 25, "madvise": 28},
    **{"rt_sigaction": 13, "rt_sigprocmask": 14, "rt_sigreturn": 15, "sigaltstack": 131},
    **{"sched_yield": 24, "futex": 202, "sched_getaffinity": 204, "rseq": 334, "membarrier": 324},
    **{"nanosleep": 35, "clock_nanosleep": 230, "restart_syscall": 219},
    **{"gettimeofday": 96, "time": 201, "clock_gettime": 228, "clock_getres": 229},
    **{"getpid": 39, "getppid": 110, "gettid": 186, "getrusage": 98, "times": 100},
    **{"getuid": 102, "getgid": 104, "geteuid": 107, "getegid": 108},
    **{"uname": 63, "sysinfo": 99, "getrandom": 318, "exit": 60, "exit_group": 231},
}
FILES = {
    **{"read": 0, "readv": 19, "pread64": 17, "write": 1, "writev": 20, "lseek": 8, "close": 3},
    **{"dup": 32, "dup2": 33, "dup3": 292, "fcntl": 72, "poll": 7, "getcwd": 79},
    **{"stat": 4, "fstat": 5, "lstat": 6, "newfstatat": 262, "statx": 332},
    **{"access": 21, "faccessat": 269, "faccessat2": 439},
    **{"readlink": 89, "readlinkat": 267, "getdents64": 217},
}
OPEN, OPENAT = (2, 1), (257, 2)
"""Number, and which argument holds the flags."""
IOCTL, TCGETS, FIOCLEX = 16, 0x5401, 0x5451


def argument(index: int) -> int:
    """Where the low half of an argument stands in struct seccomp_data."""
    return 16 + 8 * index


def system_call_filter() -> list[tuple[int, int, int, int]]:
    """Instructions of classic BPF: (code, jump if true, jump if false, operand)."""
    program = [(LOAD, 0, 0, 4), (IF_EQUAL, 1, 0, AUDIT_ARCH_X86_64), (RETURN, 0, 0, KILL)]
    program += [(LOAD, 0, 0, 0)]
    for number, flags in (OPEN, OPENAT):
        program += [
            (IF_EQUAL, 0, 4, number),
            (LOAD, 0, 0, argument(flags)),
            (IF_ANY_BIT, 0, 1, WRITING),
            (RETURN, 0, 0, REFUSE),
            (RETURN, 0, 0, ALLOW),
        ]
    # Python asks whether a file is a terminal, and that a new one be closed on exec.
    program += [
        (IF_EQUAL, 0, 5, IOCTL),
        (LOAD, 0, 0, argument(1)),
        (IF_EQUAL, 1, 0, TCGETS),
        (IF_EQUAL, 0, 1, FIOCLEX),
        (RETURN, 0, 0, ALLOW),
        (RETURN, 0, 0, REFUSE),
    ]
    for number in (COMPUTE | FILES).values():
        program += [(IF_EQUAL, 0, 1, number), (RETURN, 0, 0, ALLOW)]
    return [*program, (RETURN, 0, 0, REFUSE)]


def shut_in(cpu_seconds: int, memory_bytes: int, file_bytes: int) -> None:
    """Limits, then the filter: it also keeps the limits from being raised."""
    for which, most in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        # One second more, then the kernel ends what has caught its signal.
        resource.setrlimit(which, (most, most + (which == resource.RLIMIT_CPU)))
    code = [struct.pack("=HBBI", *instruction) for instruction in system_call_filter()]
    instructions = ctypes.create_string_buffer(b"".join(code))
    program = struct.pack("@HP", len(code), ctypes.addressof(instructions))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in (
        (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0),
    ):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def main() -> None:
    given = json.load(sys.stdin.buffer)
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)

    def say(**what: str) -> None:
        os.write(report, json.dumps(what).encode() + b"\n")

    try:
        shut_in(given["cpu_seconds"], given["memory_bytes"], given["file_bytes"])
    except (OSError, ValueError) as error:
        say(refused=str(error))
        return
    try:
        # A module of its own: dataclasses and the like look theirs up.
        answer = sys.modules["answer"] = types.ModuleType("answer")
        exec(compile(given["program"], "answer", "exec"), answer.__dict__)
    except BaseException as error:  # exit() among them: an answer that leaves has not passed
        say(failed=f"{type(error).__name__}: {error}"[:200])
    else:
        # Only who knows the word can say so.
        say(passed=given["word"])


if __name__ == "__main__":
    main()
