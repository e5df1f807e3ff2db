"""GuideLLM against the server that `make demo` starts: stock, then compressed.

    python -m venv /tmp/guidellm && /tmp/guidellm/bin/pip install guidellm
    python benchmarks/guidellm_load.py /tmp/guidellm/bin/guidellm

GuideLLM lives in an environment of its own, because its packages are not those of vLLM. Prompts
are longer than the default archive threshold. Writes a record; the deploy page's table is made
from it by `vllm-kvpca tables`.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from e2e.server import free_port

from vllm_kvpca.demo_models.catalogue import ModelName
from vllm_kvpca.demo_models.folder import ensure
from vllm_kvpca.lab.record import make_record

DEMO = Path(__file__).parents[1] / "deploy" / "local" / "demo.sh"
NAME = "SmolLM2-135M-Instruct"  # as make demo serves it
REQUESTS, CLIENTS, PROMPT, ANSWER, SEED = 12, 4, 700, 48, 0
START_SECONDS = 300


@contextmanager
def demo(preset: str, folder: Path) -> Iterator[str]:
    """The server of `make demo`, the environment being set up; its address."""
    port = free_port()
    environment = {**os.environ, "PORT": str(port), "PRESET": preset}
    with (folder / "demo.log").open("wb") as log:
        process = subprocess.Popen(
            [DEMO],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
    try:
        while not is_healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no server:\n{(folder / 'demo.log').read_text()[-3000:]}")
            time.sleep(1)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=60)


def is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def command(program: str, url: str, tokenizer: str, output: str) -> list[str]:
    backend = f"kind=openai_http,target={url},model={NAME},request_format=/v1/completions"
    data = f"kind=synthetic_text,prompt_tokens={PROMPT},prompt_tokens_stdev=100"
    return [
        *(program, "run", "--backend", backend, "--tokenizer"),
        *(f"kind=huggingface_auto,model={tokenizer}", "--data", f"{data},output_tokens={ANSWER}"),
        *("--profile", f"kind=concurrent,streams={CLIENTS}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--seed", f"kind=static,value={SEED}", "--output", f"kind=json,path={output}"),
        "--disable-progress",
    ]


def measured(report: Path) -> dict[str, Any]:
    """The figures of GuideLLM's report that the table shows."""
    metrics = json.loads(report.read_text())["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]

    def of_completed(name: str) -> dict[str, Any]:
        return metrics[name]["successful"]

    first, between = of_completed("time_to_first_token_ms"), of_completed("inter_token_latency_ms")
    return {
        "completed": totals["successful"],
        "failed": totals["errored"] + totals["incomplete"],
        "output_tokens_per_second": of_completed("output_tokens_per_second")["mean"],
        "prompt_tokens": of_completed("prompt_token_count")["mean"],
        "ttft_ms": first["median"],
        "ttft_p99_ms": first["percentiles"]["p99"],
        "itl_ms": between["median"],
        "itl_p99_ms": between["percentiles"]["p99"],
    }


def main(program: str) -> None:
    tokenizer, results = str(ensure(ModelName.smollm2)), {}
    for name, preset in (("stock", ""), ("k8v4", "k8v4")):
        with tempfile.TemporaryDirectory() as folder, demo(preset, Path(folder)) as url:
            report = Path(folder) / "report.json"
            run = command(program, url, tokenizer, str(report))
            subprocess.run(run, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=True)
            results[name] = measured(report)
    version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    shown = command("guidellm", "http://127.0.0.1:8000", "MODEL_FOLDER", "report.json")
    settings = {
        "preset": "k8v4",
        "requests": REQUESTS,
        "concurrency": CLIENTS,
        "prompt_tokens": PROMPT,
        "output_tokens": ANSWER,
        "guidellm": version.stdout.strip().rpartition(" ")[2],
        "guidellm_command": shlex.join(shown),
    }
    record = make_record("guidellm", ["k8v4"], tokenizer, settings, results, seed=SEED)
    shown_command = "python benchmarks/guidellm_load.py guidellm"
    print(record.model_copy(update={"command": shown_command}).write())


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "guidellm")
