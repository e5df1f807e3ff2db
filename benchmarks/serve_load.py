"""`vllm bench serve` against a compressed server and against stock, on this machine.

    python benchmarks/serve_load.py

The prompts are longer than the archive threshold. Writes a record; the deploy page's table is
made from it by `vllm-kvpca tables`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from e2e.server import API_KEY, COMPRESSED, NAME, POLICY, STOCK, Server, serve

from vllm_kvpca.demo_models.catalogue import ModelName
from vllm_kvpca.demo_models.folder import ensure
from vllm_kvpca.lab.record import make_record

REQUESTS, CLIENTS, PROMPT, ANSWER, SEED = 32, 8, 600, 64, 0
KEYS = {
    "completed": "completed",
    "failed": "failed",
    "output_tokens_per_second": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
}


def load(server: Server, model: str, folder: Path) -> dict[str, Any]:
    """What `vllm bench serve` measured."""
    options: dict[str, Any] = {
        "base-url": server.url,
        "model": NAME,
        "tokenizer": model,
        "dataset-name": "random",
        "random-input-len": PROMPT,
        "random-output-len": ANSWER,
        "random-range-ratio": 0.3,
        "num-prompts": REQUESTS,
        "max-concurrency": CLIENTS,
        "seed": SEED,
        "result-dir": folder,
        "result-filename": "bench.json",
    }
    command = [Path(sys.executable).parent / "vllm", "bench", "serve", "--save-result"]
    command += ["--ignore-eos", "--disable-tqdm"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    environment = {**os.environ, "OPENAI_API_KEY": API_KEY, "HF_HUB_OFFLINE": "1"}
    subprocess.run(list(map(str, command)), env=environment, check=True)
    measured = json.loads((folder / "bench.json").read_text())
    return {ours: measured[theirs] for ours, theirs in KEYS.items()}


def main() -> None:
    model = str(ensure(ModelName.smollm2))
    results = {}
    for name, arguments in (("stock", STOCK), ("k8v4", COMPRESSED)):
        with tempfile.TemporaryDirectory() as folder, serve(Path(folder), arguments) as server:
            results[name] = load(server, model, Path(folder))
    settings = {
        "preset": "k8v4",
        "compress_after": POLICY.compress_after,
        "keep_recent": POLICY.keep_recent,
        "requests": REQUESTS,
        "concurrency": CLIENTS,
        "prompt_tokens": PROMPT,
        "output_tokens": ANSWER,
        "random_range_ratio": 0.3,
    }
    record = make_record("load", ["bench-serve", "k8v4"], model, settings, results, seed=SEED)
    print(record.model_copy(update={"command": "python benchmarks/serve_load.py"}).write())


if __name__ == "__main__":
    main()
