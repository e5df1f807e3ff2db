"""A server under random load for many minutes: no error, true metrics, no leak.

    LD_PRELOAD=libtcmalloc_minimal.so.4 python benchmarks/soak.py [--minutes 20] [--stock]

tcmalloc is what vLLM advises on a CPU.

Clients send completions of random lengths, streamed or not, some with a prompt that came before;
some drop the connection in mid-stream, some cancel while they wait. The pool of blocks is small,
so that requests wait and are preempted. Ends with exit code 1, and the reasons, if

* an answer has HTTP status 500 or above, breaks off, or has another length than was asked for;
* our metrics contradict each other or vLLM's, or a counter falls;
* blocks are in use after the last request, or the server or its log show an error;
* the API server or the engine core grows: median resident memory of the last quarter against
  the second. The worker's is only reported: that of stock vLLM's CPU build grows under such a
  load too, by tens of MiB a minute, so measure both and compare.

Writes a record; the deploy page's table is made from it by `vllm-kvpca tables`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
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

from e2e.server import API_KEY, COMPRESSED, NAME, POLICY, STOCK, Scrape, Server, serve
from e2e.truth import contradictions, counters, fallen, held, pools

from vllm_kvpca.demo_models.catalogue import ModelName
from vllm_kvpca.demo_models.folder import ensure
from vllm_kvpca.lab.record import make_record

CLIENTS, SEED = 32, 0
BLOCKS = {True: 200, False: 50}
"""Of the pool, compressed and stock: as many bytes, because ours hold 32 raw tokens and those of
stock vLLM on a CPU 128. Few, so that requests are preempted."""
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


async def watch(server: Server, compressed: bool, until: float, outcome: Outcome) -> None:
    """Read metrics and memory until the end; a reading that is torn is taken again at once."""
    began, before = time.monotonic(), {}
    whole: list[float] = []
    async with httpx.AsyncClient(timeout=120) as http:
        while time.monotonic() < until:
            await asyncio.sleep(SCRAPE_EVERY)
            remember_memory(server, time.monotonic() - began, outcome)
            for _ in range(5 if compressed else 0):
                scrape = Scrape((await http.get(f"{server.url}/metrics")).text)
                outcome.scrapes += 1
                wrong = contradictions(scrape)
                whole = whole or pools(scrape)
                if pools(scrape) != whole:
                    wrong.append(f"the pool had {whole} bytes and has {pools(scrape)}")
                outcome.errors += fallen(before, now := counters(scrape))
                before = now
                if not wrong:
                    break
                outcome.read_again += 1
            else:
                if compressed:
                    outcome.errors += [f"5 readings in a row: {reason}" for reason in wrong]


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


async def load(server: Server, compressed: bool, minutes: float, outcome: Outcome) -> None:
    until = time.monotonic() + 60 * minutes
    clients = [client(number, server, until, outcome) for number in range(CLIENTS)]
    await asyncio.gather(watch(server, compressed, until, outcome), *clients)


def check_end(server: Server, compressed: bool, outcome: Outcome) -> dict[str, float]:
    """Everything given back, and nothing in the log that should worry anyone."""
    counts = {"archived_tokens": 0.0}
    scrape = server.scrape()
    if compressed:
        scrape = server.wait_until_idle(120)
        outcome.errors += contradictions(scrape)
        if held(scrape):
            outcome.errors.append("bytes, tokens or sequences are not 0 at the end")
        counts["archived_tokens"] = scrape.value("kvpca_archived_tokens_total")
    if server.process.poll() is not None or not server.is_healthy():
        outcome.errors.append("the server is not healthy at the end")
    lines = server.log.read_text(errors="replace").splitlines()
    outcome.errors += [f"log: {line}" for line in lines if "ERROR" in line or "Traceback" in line]
    return {**counts, "preemptions": scrape.value("vllm:num_preemptions_total")}


def soak(minutes: float, compressed: bool) -> tuple[dict[str, Any], list[str]]:
    """One server under load: results, and what went wrong."""
    outcome, began = Outcome(), time.monotonic()
    arguments = COMPRESSED if compressed else STOCK
    arguments = (*arguments, "--num-gpu-blocks-override", str(BLOCKS[compressed]))
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), arguments) as server:
        asyncio.run(load(server, compressed, minutes, outcome))
        counts = check_end(server, compressed, outcome)
    memory = [growth(role, series) for (role, _), series in outcome.memory.items()]
    for one in memory:
        ours = one["process"] != "Worker"
        if ours and one["last_quarter_mib"] > one["second_quarter_mib"] * (1 + GROWTH):
            outcome.errors.append(f"a process grows: {one}")
    for (role, _), series in outcome.memory.items():
        print(role, [round(size) for _, size in series[:: max(1, len(series) // 24)]])
    results = {
        "minutes": round((time.monotonic() - began) / 60, 1),
        "requests": dict(outcome.requests),
        "errors": len(outcome.errors),
        "answered_tokens": outcome.tokens,
        **counts,
        "scrapes": outcome.scrapes,
        "read_again": outcome.read_again,
        "memory": memory,
    }
    return results, outcome.errors


def main(minutes: float, compressed: bool) -> int:
    results, errors = soak(minutes, compressed)
    print(results)
    print("\n".join(errors[:40]) or "no error")
    if errors:
        return 1
    settings = {
        "preset": "k8v4" if compressed else "stock",
        "compress_after": POLICY.compress_after,
        "keep_recent": POLICY.keep_recent,
        "clients": CLIENTS,
        "blocks": BLOCKS[compressed],
        "prompt_tokens": list(PROMPT),
        "answer_tokens": list(ANSWER),
        "kinds_per_cent": KINDS,
        "preloaded": Path(os.environ.get("LD_PRELOAD", "")).name,
    }
    model = str(ensure(ModelName.smollm2))
    record = make_record("soak", [str(settings["preset"])], model, settings, results, seed=SEED)
    command = f"python benchmarks/soak.py --minutes {minutes:g}{'' if compressed else ' --stock'}"
    if settings["preloaded"]:
        command = f"LD_PRELOAD={settings['preloaded']} {command}"
    print(record.model_copy(update={"command": command}).write())
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--stock", action="store_true", help="the same load on stock vLLM")
    chosen = parser.parse_args()
    sys.exit(main(chosen.minutes, not chosen.stock))
