"""A server under random load for many minutes: no error, true metrics, no leak.

    python benchmarks/soak.py [--minutes 20]

Clients send completions of random lengths, streamed or not, some with a prompt that came before;
some drop the connection in mid-stream, some cancel while they wait. The pool of blocks is small,
so that requests wait and are preempted. Ends with exit code 1, and the reasons, if

* an answer has HTTP status 500 or above, breaks off, or has another length than was asked for;
* our metrics contradict each other or vLLM's, or a counter falls;
* blocks are in use after the last request, or the server or its log show an error;
* a process of the server grows: median resident memory of the last quarter against the second.

Writes a record; the deploy page's table is made from it by `vllm-kvpca tables`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import httpx
import psutil
from openai import APIConnectionError, APIStatusError, APITimeoutError, AsyncOpenAI

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from e2e.server import API_KEY, COMPRESSED, NAME, POLICY, Scrape, Server, serve
from e2e.truth import contradictions, counters, fallen, held

from vllm_kvpca.cli.demo_model import ModelName, ensure
from vllm_kvpca.evaluation.record import make_record

CLIENTS, BLOCKS, SEED = 32, 200, 0
PROMPT, ANSWER = (16, 1500), (8, 160)
"""Shortest and longest prompt and answer, tokens; lengths in between are log-uniform."""
KINDS = {"streamed": 45, "whole": 25, "disconnected": 20, "cancelled": 10}
"""Kinds of requests, per cent."""
ROLES = ("EngineCore", "Worker", "resource_tracker")
"""Processes beside the API server, by what their titles contain."""
SCRAPE_EVERY = 2.0
GROWTH = 0.03
"""Resident memory may differ so much between the quarters. A leak of 1 KiB per token of this
traffic would be several times that."""


@dataclass
class Outcome:
    """What clients met and what the server showed."""

    requests: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    scrapes: int = 0
    read_again: int = 0
    memory: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=dict)
    """By role and id of each process of the server: (seconds since the start, resident MiB)."""


def length(dice: random.Random, bounds: tuple[int, int]) -> int:
    low, high = bounds
    return round(low * (high / low) ** dice.random())


async def request(api: AsyncOpenAI, dice: random.Random, prompt: list[int], kind: str) -> int:
    """One request; returns the tokens of a complete answer, 0 of one that was left."""
    tokens = length(dice, ANSWER)
    body: dict[str, Any] = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "extra_body": {"ignore_eos": True},
    }
    if kind == "whole":
        usage = (await api.completions.create(**body)).usage
    elif kind == "cancelled":
        patience = dice.uniform(0.1, 5.0)
        with suppress(APITimeoutError):  # the connection is closed, as by a user who goes away
            await api.with_options(timeout=patience).completions.create(**body)
        return 0
    else:
        leave_after = dice.randrange(1, tokens) if kind == "disconnected" else None
        usage = await _stream(api, body, leave_after)
        if leave_after is not None:
            return 0
    if usage is None or (usage.prompt_tokens, usage.completion_tokens) != (len(prompt), tokens):
        raise ValueError(f"asked for {len(prompt)} + {tokens} tokens, the answer says {usage}")
    return tokens


async def _stream(api: AsyncOpenAI, body: dict[str, Any], leave_after: int | None) -> Any:
    """The usage that ends a stream; with `leave_after` the connection is dropped before."""
    answer = await api.completions.create(
        **body, stream=True, stream_options={"include_usage": True}
    )
    usage, chunks = None, 0
    async with answer:
        async for chunk in answer:
            usage, chunks = chunk.usage or usage, chunks + 1
            if chunks == leave_after:
                break
    return usage


async def client(number: int, server: Server, until: float, outcome: Outcome) -> None:
    dice = random.Random(SEED + number)
    prompts: list[list[int]] = []
    async with AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=600
    ) as api:
        while time.monotonic() < until:
            prompts.append([dice.randrange(1000, 4000) for _ in range(length(dice, PROMPT))])
            prompt = dice.choice(prompts) if dice.random() < 0.3 else prompts[-1]
            kind = dice.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                tokens = await request(api, dice, prompt, kind)
                outcome.tokens += tokens
                outcome.requests[kind] += 1
            except (APIStatusError, APIConnectionError, httpx.HTTPError, ValueError) as error:
                outcome.errors.append(f"{kind}: {type(error).__name__}: {error}")
                await asyncio.sleep(1)


async def watch(server: Server, until: float, outcome: Outcome) -> None:
    """Read metrics and memory until the end; a reading that is torn is taken again at once."""
    began, before = time.monotonic(), {}
    async with httpx.AsyncClient(timeout=120) as http:
        while time.monotonic() < until:
            await asyncio.sleep(SCRAPE_EVERY)
            for _ in range(5):
                scrape = Scrape((await http.get(f"{server.url}/metrics")).text)
                outcome.scrapes += 1
                wrong = contradictions(scrape)
                outcome.errors += fallen(before, now := counters(scrape))
                before = now
                if not wrong:
                    break
                outcome.read_again += 1
            else:
                outcome.errors += [f"metrics, 5 readings in a row: {reason}" for reason in wrong]
            remember_memory(server, time.monotonic() - began, outcome)


def remember_memory(server: Server, at: float, outcome: Outcome) -> None:
    top = psutil.Process(server.process.pid)
    for process in (top, *top.children(recursive=True)):
        try:
            name = " ".join(process.cmdline())
            size = process.memory_info().rss / 2**20
        except psutil.NoSuchProcess:
            continue
        role = next((role for role in ROLES if role in name), "API server")
        outcome.memory.setdefault((role, process.pid), []).append((at, size))


def growth(role: str, series: list[tuple[float, float]]) -> dict[str, Any]:
    """Resident memory of one process: medians of the second and the last quarter, and the slope
    of the second half, MiB."""
    quarter = max(1, len(series) // 4)
    second, last = series[quarter : 2 * quarter], series[-quarter:]
    half = series[len(series) // 2 :]
    slope = linear_regression(*zip(*half, strict=True)).slope if len(half) > 1 else 0.0
    return {
        "process": role,
        "second_quarter_mib": round(median(size for _, size in second or last), 1),
        "last_quarter_mib": round(median(size for _, size in last), 1),
        "slope_mib_per_minute": round(slope * 60, 3),
    }


async def load(server: Server, minutes: float, outcome: Outcome) -> None:
    until = time.monotonic() + 60 * minutes
    clients = [client(number, server, until, outcome) for number in range(CLIENTS)]
    await asyncio.gather(watch(server, until, outcome), *clients)


def check_end(server: Server, outcome: Outcome) -> Scrape:
    """Everything given back, and nothing in the log that should worry anyone."""
    scrape = server.wait_until_idle(120)
    outcome.errors += contradictions(scrape)
    if held(scrape):
        outcome.errors.append("bytes, tokens or sequences are not 0 at the end")
    if server.process.poll() is not None or not server.is_healthy():
        outcome.errors.append("the server is not healthy at the end")
    lines = server.log.read_text(errors="replace").splitlines()
    outcome.errors += [f"log: {line}" for line in lines if "ERROR" in line or "Traceback" in line]
    return scrape


def main(minutes: float) -> int:
    outcome, began = Outcome(), time.monotonic()
    arguments = (*COMPRESSED, "--num-gpu-blocks-override", str(BLOCKS))
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), arguments) as server:
        asyncio.run(load(server, minutes, outcome))
        end = check_end(server, outcome)
    memory = [growth(role, series) for (role, _), series in outcome.memory.items()]
    for sizes in memory:
        if sizes["last_quarter_mib"] > sizes["second_quarter_mib"] * (1 + GROWTH):
            outcome.errors.append(f"a process grows: {sizes}")
    results = {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "requests": dict(outcome.requests),
        "errors": len(outcome.errors),
        "answered_tokens": outcome.tokens,
        "archived_tokens": end.value("kvpca_archived_tokens_total"),
        "preemptions": end.value("vllm:num_preemptions_total"),
        "scrapes": outcome.scrapes,
        "read_again": outcome.read_again,
        "memory": memory,
    }
    print(results)
    print("\n".join(outcome.errors[:40]) or "no error")
    if outcome.errors:
        return 1
    settings = {
        "preset": "k8v4",
        "compress_after": POLICY.compress_after,
        "keep_recent": POLICY.keep_recent,
        "clients": CLIENTS,
        "blocks": BLOCKS,
        "prompt_tokens": list(PROMPT),
        "answer_tokens": list(ANSWER),
        "kinds_per_cent": KINDS,
    }
    model = str(ensure(ModelName.smollm2))
    record = make_record("soak", ["k8v4"], model, settings, results, seed=SEED)
    command = f"python benchmarks/soak.py --minutes {minutes:g}"
    print(record.model_copy(update={"command": command}).write())
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    sys.exit(main(parser.parse_args().minutes))
