"""The served engine on a GPU, on the real SmolLM2: python tests/gpu/check_engine.py REFERENCE

REFERENCE is a JSON file with prompts (token ids), sampling, and the answers of the CPU engine,
"stock" and "k8v4", each with tokens and gaps (see tests/e2e/run_engine.py), in float16. Checked:

* greedy answers of stock vLLM and of the format raw, with CUDA graphs, agree up to ties;
* those of k8v4 with CUDA graphs, without them, and on the CPU agree up to ties;
* 500 requests of random lengths in a pool too small for them are preempted, all answered, and
  give every block back; meanwhile the time spent archiving was sampled by CUDA events.

All engines run side by side.
"""

from __future__ import annotations

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "e2e")]

from engines import GREEDY, TIE, model, run  # noqa: E402

COMPRESS = {"compress_after": 256, "keep_recent": 128}
MEMORY = {"gpu_memory_utilization": 0.15, "kv_cache_memory_bytes": 4 << 30}
GRAPHS = {
    "enforce_eager": False,
    "max_num_seqs": 64,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]},
}
SPREAD = 0.6
"""k8v4 quantizes: where codes differ by one step, logits move more than by rounding. Nats."""


def differences(wanted: list[dict], got: list[dict]) -> list[tuple[int, int, float]]:
    """(prompt, token, gap in the wanted answer) of every first difference."""
    found = []
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        pairs = zip(a["tokens"], b["tokens"], strict=True)
        at = next((at for at, (x, y) in enumerate(pairs) if x != y), None)
        if at is not None:
            found.append((index, at, a["gaps"][at]))
    return found


def report(name: str, wanted: list[dict], got: list[dict], tie: float) -> bool:
    found = differences(wanted, got)
    right = all(gap < tie for _, _, gap in found)
    gaps = ", ".join(f"prompt {p} token {t} gap {gap:.3f}" for p, t, gap in found)
    print(
        f"{'ok  ' if right else 'FAIL'} {name}: {len(wanted) - len(found)} of {len(wanted)} "
        f"identical{'; ' + gaps if gaps else ''}",
        flush=True,
    )
    return right


def answers(reference: dict[str, Any], preset: str | None, **llm: Any) -> list[dict]:
    begin = time.monotonic()
    options = {"preset": preset, **COMPRESS} if preset else None
    rounds = [{"prompts": reference["prompts"], "sampling": reference["sampling"]}] * 2
    result = run(rounds, options, **MEMORY, **llm)
    print(f"     {preset} {llm}: {time.monotonic() - begin:.0f} s", flush=True)
    if preset:
        assert result["metrics"]["kvpca_archived_tokens_total"] > 2000
        assert result["free_blocks"] == result["usable_blocks"]
    found = differences(result["rounds"][0], result["rounds"][1])
    print(f"     second round, through the prefix cache: {len(found)} parted {found}", flush=True)
    return result["rounds"][0]


def check_random_requests(count: int = 500) -> bool:
    """Random lengths, a small pool, async scheduling and CUDA graphs."""
    rng = random.Random(0)
    rounds = []
    for length in (40, 400, 1500):  # three waves; in each all lengths up to the bound
        prompts = [
            [rng.randrange(1000, 40000) for _ in range(rng.randrange(1, length))]
            for _ in range(count // 3 + 1)
        ]
        rounds.append({"prompts": prompts, "sampling": {**GREEDY, "max_tokens": 150}})
    result = run(
        rounds, {"preset": "k8v4", **COMPRESS}, num_gpu_blocks_override=400, **MEMORY, **GRAPHS
    )
    whole = all(len(a["tokens"]) == 150 for answers in result["rounds"] for a in answers)
    returned = result["free_blocks"] == result["usable_blocks"]
    preempted = result["preemptions"]
    samples, seconds = (
        result["metrics"][f"kvpca_archive_step_seconds_{part}"] for part in ("count", "sum")
    )
    # Hundreds of steps archive, and none takes as long as a whole step; 1 us is a clock's grain.
    timed = samples >= 10 and 1e-6 < seconds / samples < 0.05
    right = whole and returned and preempted > 0 and timed
    print(
        f"{'ok  ' if right else 'FAIL'} {3 * (count // 3 + 1)} random requests: "
        f"{preempted} preemptions, {result['free_blocks']} of {result['usable_blocks']} "
        f"blocks back, all answered: {whole}; archiving took "
        f"{1e6 * seconds / max(1, samples):.0f} us per step in {samples:.0f} samples",
        flush=True,
    )
    return right


def main(path: str) -> None:
    reference = json.loads(Path(path).read_text())
    model()  # converted once, not by every thread
    with ThreadPoolExecutor() as pool:
        waves = pool.submit(check_random_requests)
        running = [
            pool.submit(answers, reference, preset, **llm)
            for preset, llm in (("k8v4", GRAPHS), ("k8v4", {}), ("raw", GRAPHS), (None, GRAPHS))
        ]
        graphs, eager, raw, stock = (future.result() for future in running)
    checks = [
        report("raw against stock, CUDA graphs", stock, raw, TIE),
        report("k8v4, CUDA graphs against eager", eager, graphs, TIE),
        report("stock, GPU against CPU", reference["stock"], stock, TIE),
        report("k8v4, GPU against CPU", reference["k8v4"], graphs, SPREAD),
        waves.result(),
    ]
    sys.exit(not all(checks))


if __name__ == "__main__":
    main(sys.argv[1])
