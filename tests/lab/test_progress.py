"""The bar of tokens: whole at 80 columns, with the rate and the time that is left."""

from __future__ import annotations

import io
from functools import partial

import pytest
from rich.console import Console
from rich.progress import Progress

from vllm_kvpca.lab import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    time = [100.0]
    make = partial(Progress, get_time=lambda: time[0], auto_refresh=False)
    monkeypatch.setattr(progress, "Progress", make)
    return time


def last_line(console: Console) -> str:
    lines = console.file.getvalue().replace("\r", "\n").splitlines()
    return [line for line in lines if "tokens" in line][-1]


def shown(clock, steps, total, done=0):
    """The last line after windows of (seconds, tokens)."""
    console = Console(file=io.StringIO(), width=80)
    with progress.tokens(console, total, done) as advance:
        for seconds, tokens in steps:
            clock[0] += seconds
            advance(tokens)
    return last_line(console)


def test_there_is_a_rate_and_a_time_after_the_first_window(clock):
    line = shown(clock, [(20, 2048)], 61_440)
    assert "2,048 of 61,440 tokens" in line and "102/s" in line
    assert "0:00:20" in line and "left 0:09:40" in line  # 59,392 tokens at 102.4 per second


def test_slow_windows_count_all(clock):
    line = shown(clock, [(60, 600), (60, 1200)], 3000)
    assert "15/s" in line and "left 0:01:20" in line


def test_tokens_of_an_earlier_run_are_done_and_do_not_count_as_fast(clock):
    line = shown(clock, [(10, 1000)], 10_000, done=5000)
    assert "6,000 of 10,000 tokens" in line and "100/s" in line and "left 0:00:40" in line


def test_the_line_is_whole_at_80_columns(clock):
    line = shown(clock, [(36_000, 123_456_789)], 1_000_000_000)
    assert len(line) <= 80
    assert "123,456,789 of 1,000,000,000 tokens" in line and "3,429/s" in line
    assert "10:00:00" in line and "left" in line
