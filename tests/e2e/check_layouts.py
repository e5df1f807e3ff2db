"""Metrics in every process layout: complete, true, and back at zero after a restart.

Not collected by pytest, because it starts nine servers: `make test-layouts` runs it. Each layout
gets the same known traffic; what the metrics counted is compared with what the policy says of
these lengths, and readings taken all the while must not contradict vLLM's own metrics. Then an
engine is killed: our server must end as stock's does. Writes a record; the deploy page's table
is made from it by `vllm-kvpca tables`.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from e2e.engines import UNBOUND
from e2e.server import COMPRESSED, NAME, POLICY, STOCK, Scrape, Server, serve
from e2e.truth import contradictions, counters, engines, fallen, held, pools

from vllm_kvpca.demo_models.catalogue import ModelName
from vllm_kvpca.demo_models.folder import ensure
from vllm_kvpca.lab.record import load_all, make_record
from vllm_kvpca.metrics import all_series

LENGTHS = [(100, 50), (300, 60), (450, 40), (700, 80), (900, 30), (240, 40)]
"""Tokens of prompts and answers: some stay raw, some are archived from the start or on the way."""
KV_HEADS, LAYERS = 3, 30  # of SmolLM2-135M
PAGE = 32 * KV_HEADS * LAYERS * 64 * 2 * 2  # 32 raw tokens of 64 components, K and V, 16 bits
HEAD_BYTES = 100  # of one archived token and head: 64 x 8 bits, 64 x 4 bits, two scales
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one API server, one engine": (),
    "the same, started again": (),
    "--api-server-count 2": ("--api-server-count", "2"),
    "--data-parallel-size 2": ("--data-parallel-size", "2"),
    "--data-parallel-size 2 --api-server-count 2": (
        *("--data-parallel-size", "2"),
        *("--api-server-count", "2"),
    ),
    "--tensor-parallel-size 3": ("--tensor-parallel-size", "3"),
}
ENDS_WITHIN = 90


def prompt(number: int, length: int) -> list[int]:
    """Exactly so many tokens; no two numbers share a prefix."""
    return [1000 + (number * 37 + i * (number + 1)) % 400 for i in range(length)]


def send(server: Server, number: int) -> None:
    length, count = LENGTHS[number]
    with server.client() as api:
        answer = api.completions.create(
            model=NAME,
            prompt=prompt(number, length),
            max_tokens=count,
            extra_body={"ignore_eos": True},
        )
    assert answer.usage is not None and answer.usage.completion_tokens == count


def read(server: Server, whole: list[float]) -> tuple[Scrape, list[str], int]:
    """A reading, what is wrong with it, and how many torn ones came before."""
    for torn in range(6):
        scrape = server.scrape()
        wrong = [reason for engine in engines(scrape) for reason in contradictions(scrape, engine)]
        if pools(scrape) != whole:
            wrong.append(f"the pools of the engines were {whole} bytes and are {pools(scrape)}")
        if not wrong:
            return scrape, [], torn
    return scrape, wrong, 5


def idle(server: Server) -> Scrape:
    """The reading with which every engine says that it holds nothing."""
    deadline = time.monotonic() + 60
    while True:
        scrape = server.scrape()
        left = {engine: held(scrape, engine) for engine in engines(scrape)}
        if not any(left.values()):
            return scrape
        if time.monotonic() > deadline:
            raise AssertionError(f"60 s after the last answer engines hold {left}")
        time.sleep(0.2)


def total(scrape: Scrape, name: str) -> float:
    return sum(scrape.samples[name].values())


def check_start(scrape: Scrape, ranks: int) -> list[str]:
    """All series are there, every counter stands at 0, and the pool is as large as vLLM says."""
    names = {name for name in scrape.samples if name.startswith("kvpca_")}
    wrong = [f"{name} is missing at the start" for name in all_series() if name not in names]
    grown = {name for (name, _), value in counters(scrape).items() if value}
    # vLLM counts the null block too, and all its engines together.
    (info,) = {dict(key)["num_gpu_blocks"] for key in scrape.samples["vllm:cache_config_info"]}
    usable = int(info) // len(engines(scrape)) - 1
    if pools(scrape) != [usable * PAGE // ranks] * len(engines(scrape)):
        wrong.append(f"pools of {pools(scrape)} bytes, and vLLM has {info} blocks")
    # Archive times of the warm-up may come with the first report.
    return wrong + [f"{name} does not start at 0" for name in grown if "step_seconds" not in name]


def check_end(scrape: Scrape, ranks: int) -> list[str]:
    """What was counted is what the policy says: the last token of an answer is never computed."""
    boundaries = [POLICY.boundary(length + count - 1) for length, count in LENGTHS]
    expected = {
        "kvpca_archived_tokens_total": sum(boundaries),
        "kvpca_archive_written_bytes_total": (
            sum(boundaries) * HEAD_BYTES * LAYERS * KV_HEADS // ranks
        ),
        "kvpca_request_archived_tokens_count": len(LENGTHS),
        "kvpca_request_archived_tokens_sum": sum(boundaries),
    }
    found = {name: total(scrape, name) for name in expected}
    return [f"{n}: {found[n]}, expected {expected[n]}" for n in expected if found[n] != expected[n]]


def check_layout(arguments: tuple[str, ...]) -> tuple[dict[str, Any], list[str]]:
    """One server and its traffic: what the table shows, and what is wrong."""
    parallel = any("parallel" in argument for argument in arguments)
    more = UNBOUND if parallel else {}
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(Path(folder), (*COMPRESSED, *arguments), more) as server,
    ):
        start = server.scrape()
        ranks = 3 if "--tensor-parallel-size" in arguments else 1
        wrong, before = check_start(start, ranks), counters(start)
        readings = torn = most = 0
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(send, server, number) for number in range(len(LENGTHS))]
            while not all(job.done() for job in jobs):
                scrape, problems, again = read(server, pools(start))
                now = counters(scrape)
                wrong += problems + fallen(before, now)
                before, readings, torn = now, readings + 1, torn + again
                running = scrape.samples["vllm:num_requests_running"].values()
                most = max(most, sum(bool(count) for count in running))
            for job in jobs:
                job.result()
        end = idle(server)
        wrong += check_end(end, ranks) + fallen(before, counters(end))
        names = engines(end)
        wrong += [r for engine in names for r in contradictions(end, engine)]
        if most < len(names):
            wrong.append(f"only {most} of {len(names)} engines had work at the same time")
        shown = {
            "engines": len(names),
            "requests": int(total(end, "kvpca_request_archived_tokens_count")),
            "archived_tokens": int(total(end, "kvpca_archived_tokens_total")),
            "readings": readings,
            "read_again": torn,
        }
    return shown, wrong


def kill_engine(arguments: tuple[str, ...]) -> dict[str, Any]:
    """Kill the engine while it answers; how the server and the answer ended."""
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder), arguments) as server:
        failed = threading.Event()

        def ask() -> None:
            try:
                with server.client() as api:
                    api.completions.create(
                        model=NAME,
                        prompt=prompt(0, 300),
                        max_tokens=3000,
                        extra_body={"ignore_eos": True},
                    )
            except Exception:
                failed.set()

        asking = threading.Thread(target=ask)
        asking.start()
        while not total(server.scrape(), "vllm:num_requests_running"):
            time.sleep(0.2)
        children = psutil.Process(server.process.pid).children(recursive=True)
        (engine,) = (p for p in children if "EngineCore" in " ".join(p.cmdline()))
        os.kill(engine.pid, signal.SIGKILL)
        code = server.process.wait(timeout=ENDS_WITHIN)
        asking.join(timeout=30)
        return {"exit_code": code, "answer_failed": failed.is_set(), "answers": server.is_healthy()}


def write(results: dict[str, Any], ends: dict[str, Any]) -> None:
    """Write the record; what an earlier run of the same commit found stays in it."""
    settings = {"preset": "k8v4", "lengths": [list(pair) for pair in LENGTHS]}
    model = str(ensure(ModelName.smollm2))
    record = make_record("layouts", ["k8v4"], model, settings, {})
    earlier = next((r for r in load_all(kind="layouts") if r.slug == record.slug), None)
    if earlier and (earlier.commit, earlier.dirty) == (record.commit, record.dirty):
        results = {**earlier.results["layouts"], **results}  # type: ignore[dict-item]
        ends = ends or earlier.results["engine_killed"]  # type: ignore[assignment]
    in_order = {name: results[name] for name in LAYOUTS if name in results}
    found = {"layouts": in_order, "engine_killed": ends}
    update = {"command": "make test-layouts", "results": found}
    print(record.model_copy(update=update).write())


def main(chosen: list[str]) -> int:
    """Check all layouts, or those named ("killed" is the end of an engine)."""
    results: dict[str, Any] = {}
    ends: dict[str, Any] = {}
    wrong: list[str] = []
    for name, arguments in LAYOUTS.items():
        if not chosen or name in chosen:
            results[name], problems = check_layout(arguments)
            print(name, results[name], *problems[:20], sep="\n  ", flush=True)
            wrong += problems
    if not chosen or "killed" in chosen:
        ends = {name: kill_engine(a) for name, a in (("stock", STOCK), ("k8v4", COMPRESSED))}
        print("engine killed:", ends)
        if ends["stock"] != ends["k8v4"] or ends["k8v4"]["answers"]:
            wrong.append(f"a server whose engine died does not end as stock's: {ends}")
    if wrong:
        print(*wrong[-1:], sep="\n")
        return 1
    write(results, ends)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
