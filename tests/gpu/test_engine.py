"""The served engine on a GPU, on the real SmolLM2.

    python -m pytest -m gpu tests/gpu tests/ops

Answers are compared with those of the CPU's engine in cpu_answers.json (cpu_answers.py makes it).
All engines run side by side, each in a process of its own: their starts take most of the time.
"""

from __future__ import annotations

import json
import random
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from cpu_answers import FILE, LENGTHS, SAMPLING, THRESHOLDS
from engines import GREEDY, TIE, archived_tokens, model, run, text_prompts

pytestmark = pytest.mark.gpu

MEMORY = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 3 << 30}
GRAPHS = {
    "enforce_eager": False,
    "max_num_seqs": 64,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
}
CODES = 0.6
"""Where codes differ by one step, logits move more than by rounding. Nats."""
LOUD = {"preset": "k8v4", **THRESHOLDS}


def rounds(count: int) -> list[dict[str, Any]]:
    """The same prompts `count` times: all but the first through the prefix cache."""
    return [{"prompts": text_prompts(LENGTHS), "sampling": SAMPLING}] * count


def random_rounds(count: int = 500) -> list[dict[str, Any]]:
    """Three waves of random requests; in each all lengths up to a bound."""
    rng = random.Random(0)
    return [
        {
            "prompts": [
                [rng.randrange(1000, 40000) for _ in range(rng.randrange(1, length))]
                for _ in range(count // 3 + 1)
            ],
            "sampling": {**GREEDY, "max_tokens": 150},
        }
        for length in (40, 400, 1500)
    ]


JOBS: dict[str, tuple[list, dict | None, dict]] = {
    "stock": (rounds(2), None, GRAPHS),
    "raw": (rounds(2), {"preset": "raw", **THRESHOLDS}, GRAPHS),
    "k8v4": (rounds(2), LOUD, GRAPHS),
    "k8v4 eager": (rounds(2), LOUD, {}),
    "random": (random_rounds(), LOUD, {**GRAPHS, "num_gpu_blocks_override": 400}),
    "asleep": (
        [*rounds(1), {**rounds(1)[0], "sleep": 2}],
        {"preset": "kh8v4", **THRESHOLDS},
        {"enable_sleep_mode": True},
    ),
}


@pytest.fixture(scope="module")
def results():
    """What each engine answered, by its job's name; a failure is its own test's."""
    model()  # converted once, not by every thread
    with ThreadPoolExecutor(len(JOBS)) as pool:
        running: dict[str, Future[Any]] = {
            name: pool.submit(run, job, options, **{**MEMORY, **llm})
            for name, (job, options, llm) in JOBS.items()
        }
    return running


def differences(wanted: list[dict], got: list[dict]) -> list[float]:
    """The wanted answer's gap at every first difference, in nats."""
    found = []
    for a, b in zip(wanted, got, strict=True):
        pairs = zip(a["tokens"], b["tokens"], strict=True)
        at = next((at for at, (x, y) in enumerate(pairs) if x != y), None)
        if at is not None:
            found.append(a["gaps"][at])
    return found


@pytest.mark.parametrize(
    "wanted, got, limit",
    [("stock", "raw", TIE), ("k8v4 eager", "k8v4", TIE), ("stock", "k8v4", CODES)],
)
@pytest.mark.parametrize("round_", [0, 1], ids=["first", "through the prefix cache"])
def test_answers_agree_up_to_ties(results, wanted, got, limit, round_):
    answers = [results[name].result()["rounds"][round_] for name in (wanted, got)]
    assert all(gap < limit for gap in differences(*answers)), differences(*answers)


@pytest.mark.parametrize("name, limit", [("stock", TIE), ("k8v4", CODES)])
def test_answers_agree_with_the_cpu(results, name, limit):
    wanted = json.loads(FILE.read_text())[name]
    found = differences(wanted, results[name].result()["rounds"][0])
    assert all(gap < limit for gap in found), found


@pytest.mark.parametrize("name", ["raw", "k8v4", "k8v4 eager"])
def test_every_block_comes_back(results, name):
    result = results[name].result()
    wanted = archived_tokens(result, LENGTHS, SAMPLING["max_tokens"], THRESHOLDS)
    assert result["metrics"]["kvpca_archived_tokens_total"] >= wanted > 2000
    assert result["free_blocks"] == result["usable_blocks"]
    cached = [answer["cached"] for answer in result["rounds"][1]]
    # All whole raw blocks but what must be computed anew for the last token.
    block = min(size for kind, _, size in result["groups"] if kind == "RecentSpec")
    assert all(hit >= n - 2 * block for hit, n in zip(cached, LENGTHS, strict=True)), cached


def test_random_requests_under_pressure(results):
    """Preempted, all answered, every block back; meanwhile archiving was timed by CUDA events."""
    result = results["random"].result()
    assert all(len(a["tokens"]) == 150 for answers in result["rounds"] for a in answers)
    assert result["preemptions"] > 0
    assert result["free_blocks"] == result["usable_blocks"]
    samples, seconds = (
        result["metrics"][f"kvpca_archive_step_seconds_{part}"] for part in ("count", "sum")
    )
    # Hundreds of steps archive, and none takes as long as a whole step; 1 us is a clock's grain.
    assert samples >= 10 and 1e-6 < seconds / samples < 0.05


def test_sleep_level_2_keeps_the_bases(results):
    """Everything but buffers is dropped and the weights are loaded again."""
    first, second = results["asleep"].result()["rounds"]
    assert all(gap < TIE for gap in differences(first, second)), differences(first, second)
