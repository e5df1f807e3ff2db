"""Each limit holds: real programs, in the real sandbox."""

import socket
import sys
import time

import pytest

from vllm_kvpca.errors import SetupError
from vllm_kvpca.lab import sandbox
from vllm_kvpca.lab.sandbox import CRASHED, FAILED, PASSED, TIMED_OUT, Limits, run

SHORT = Limits(cpu_seconds=1, wall_seconds=10, memory_mib=256)


def test_a_program_passes_by_reaching_its_end():
    assert run("import collections, math, re\nassert math.gcd(4, 6) == 2").result == PASSED
    wrong = run("assert 1 + 1 == 3, 'sum'")
    assert (wrong.result, wrong.reason) == (FAILED, "AssertionError: sum")
    assert run("def f(:").reason.startswith("SyntaxError")
    for early in ("exit()", "raise SystemExit(0)", "import os; os._exit(0)"):
        assert run(f"{early}\nassert False").result in (FAILED, CRASHED)


def test_what_programs_use_of_the_standard_library_works():
    program = """
import asyncio, concurrent.futures, datetime, decimal, doctest, fractions, functools, hashlib
import heapq, itertools, json, logging, multiprocessing, os, random, secrets, statistics, string
import sys, tempfile, threading, time, typing, unittest, uuid, zoneinfo
from dataclasses import dataclass

@dataclass
class Point:
    x: "int"
    others: "typing.List[int]" = None

print(Point(1), file=sys.stderr)
assert hashlib.md5(b"x").hexdigest() and random.random() < 1 and secrets.token_hex()
assert os.cpu_count() and datetime.datetime.now().astimezone() and uuid.uuid4()
time.sleep(0.01)
"""
    assert run(program) == sandbox.Outcome(PASSED)


def test_who_says_passed_without_the_word_has_not():
    program = """
import os
for fd in range(3, 64):
    try:
        os.write(fd, b'{"passed": "yes"}\\n')
    except OSError:
        pass
os._exit(0)
"""
    assert run(program).result == CRASHED


def test_an_endless_loop_ends_by_cpu_time_and_a_sleeper_by_the_clock():
    started = time.monotonic()
    assert run("while True: pass", SHORT).result == TIMED_OUT
    assert run("import time; time.sleep(60)", Limits(wall_seconds=1)).result == TIMED_OUT
    # Its limit cannot be raised, nor its signal ignored for longer than a second.
    program = """
import resource, signal
signal.signal(signal.SIGXCPU, signal.SIG_IGN)
try:
    resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
except (OSError, ValueError):
    pass
while True: pass
"""
    assert run(program, SHORT).result == TIMED_OUT
    assert time.monotonic() - started < 20


def test_a_memory_hog_gets_no_more_than_its_limit():
    assert run("x = bytearray(100 << 20)", SHORT).result == PASSED
    assert run("x = bytearray(300 << 20)", SHORT).reason.startswith("MemoryError")


@pytest.mark.parametrize(
    "program",
    [
        "import os\nos.fork()",
        "import os\nos.posix_spawn('/bin/true', ['true'], {})",
        "import os\nos.execv('/bin/true', ['true'])",
        "import os\nif os.system('true') != 0: raise PermissionError('no process')",
        "import subprocess\nsubprocess.run(['/bin/true'])",
        "import threading\nthreading.Thread(target=print).start()",
        "import multiprocessing\nmultiprocessing.Process(target=print).start()",
        "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)",
        "import ctypes, os\nif ctypes.CDLL(None).fork() < 0: raise PermissionError('no process')",
    ],
)
def test_no_process_is_started_or_signalled(program):
    """A fork bomb ends with its first fork."""
    outcome = run(program)
    assert outcome.result == FAILED
    assert outcome.reason.split(":")[0] in ("PermissionError", "RuntimeError"), outcome


@pytest.mark.parametrize(
    "attempt",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}, 'r+')",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, {path!r} + '.moved')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.chmod({path!r}, 0)",
        "import os; os.mkdir({path!r} + '.folder')",
        "import os; os.symlink({path!r}, {path!r} + '.link')",
        "import pathlib; pathlib.Path({path!r} + '.new').touch()",
        "open('in-its-own-folder', 'w')",
    ],
)
def test_no_file_is_made_changed_or_removed(attempt, tmp_path):
    path = tmp_path / "precious"
    path.write_text("as it was")
    before = path.stat()
    assert run(f"print(open({str(path)!r}).read())").result == PASSED
    outcome = run(attempt.format(path=str(path)))
    assert outcome.reason.startswith("PermissionError"), outcome
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]
    assert path.read_text() == "as it was" and path.stat().st_mode == before.st_mode


@pytest.mark.parametrize("command", [0, 1, 12])
def test_a_device_takes_no_command(command):
    """Numbers that are allowed system calls are no allowed commands."""
    outcome = run(f"import fcntl, os\nfcntl.ioctl(os.open('/dev/null', os.O_RDONLY), {command})")
    assert outcome.reason.startswith("PermissionError"), outcome


def test_what_it_writes_to_its_report_is_bounded():
    program = "import os\nwhile True: os.write(3, b'x' * 4096)"
    started = time.monotonic()
    assert run(program, Limits(cpu_seconds=30)).result == CRASHED  # its own last word did not fit
    assert time.monotonic() - started < 10


def test_there_is_no_network():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for attempt in (
            f"import socket; socket.create_connection(('127.0.0.1', {port}), 1)",
            "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)",
            "import socket; socket.socket(socket.AF_UNIX)",
            "import socket; socket.socketpair()",
            f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{port}')",
        ):
            outcome = run(attempt)
            assert outcome.result == FAILED, attempt
            assert "Operation not permitted" in outcome.reason
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_environment_and_folder_are_empty(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    program = """
import os, sys
assert 'HF_TOKEN' not in os.environ and 'HOME' not in os.environ
assert os.listdir('.') == []
assert not any('site-packages' in path for path in sys.path)
"""
    assert run(program).result == PASSED


def test_many_run_side_by_side_and_keep_their_order():
    counted = []
    programs = [f"assert {n} % 2 == 0" for n in range(6)]
    outcomes = sandbox.run_all(programs, after_each=lambda: counted.append(1))
    assert [outcome.result for outcome in outcomes] == [PASSED, FAILED] * 3
    assert len(counted) == 6


def test_where_nothing_can_be_shut_in_nothing_is_run(monkeypatch):
    assert sandbox.isolation()["filter"] == "seccomp"
    without = sandbox._source().replace("PR_SET_SECCOMP, SECCOMP_MODE_FILTER =", "_, _ =", 1)
    without = without.replace("libc.prctl(*arguments) != 0", "True")
    assert without != sandbox._source()
    monkeypatch.setattr(sandbox, "_source", lambda: without)
    with pytest.raises(SetupError, match="no sandbox here"):
        sandbox.isolation()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SetupError, match="no sandbox on darwin"):
        sandbox.isolation()
