"""A real `vllm serve` process with a compressed KV cache, for tests that talk to it by HTTP."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

from vllm_kvpca.demo_models.catalogue import ModelName
from vllm_kvpca.demo_models.folder import ensure
from vllm_kvpca.pages.boundary import Policy

NAME = "smol"
API_KEY = "a key of the tests"
MAX_MODEL_LEN = 4096
START_SECONDS = 240
"""A start takes about 20 s; a machine that does other work besides needs several times that."""

# What the page plan of k8v4 comes to for this model: 256 raw and 100 archived bytes per head.
RAW_BLOCK, ARCHIVE_BLOCK = 32, 80
POLICY = Policy(compress_after=256, keep_recent=128, align=ARCHIVE_BLOCK)
HIT_STEP = RAW_BLOCK
STOCK = (
    *("--served-model-name", NAME, "--max-model-len", str(MAX_MODEL_LEN), "--enforce-eager"),
    *("--api-key", API_KEY, "--enable-prompt-tokens-details"),
)
COMPRESSED = (
    *STOCK,
    *("--kv-compression-preset", "k8v4"),
    *("--kv-compress-after", str(POLICY.compress_after)),
    *("--kv-keep-recent", str(POLICY.keep_recent)),
)

Labels = frozenset[tuple[str, str]]


class Scrape:
    """One reading of /metrics."""

    def __init__(self, text: str) -> None:
        self.samples: dict[str, dict[Labels, float]] = defaultdict(dict)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self.samples[sample.name][frozenset(sample.labels.items())] = sample.value

    def value(self, name: str, **labels: str) -> float:
        """The one sample of that name that carries these labels."""
        wanted = set(labels.items())
        found = [v for key, v in self.samples.get(name, {}).items() if wanted <= key]
        assert len(found) == 1, f"{len(found)} samples of {name} with {labels}"
        return found[0]


class Server:
    """A running server: its address, its client, its log and its metrics."""

    def __init__(self, port: int, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.process = process

    def client(self) -> OpenAI:
        """The client that users have, without its retries: they would hide failures."""
        return OpenAI(base_url=f"{self.url}/v1", api_key=API_KEY, max_retries=0, timeout=240)

    def metrics(self) -> str:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            return str(answer.read().decode())

    def scrape(self) -> Scrape:
        return Scrape(self.metrics())

    def is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self.is_healthy():
            code = self.process.poll()
            if code is not None:
                raise RuntimeError(f"vllm serve ended with exit code {code}:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise RuntimeError(f"no /health in {START_SECONDS} s:\n{self.log_tail()}")
            time.sleep(0.5)

    def wait_until_idle(self, seconds: float = 60) -> Scrape:
        """The first scrape with no block in use and no request left; fails after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            scrape = self.scrape()
            held = [
                scrape.value("kvpca_kv_cache_bytes", state="raw"),
                scrape.value("kvpca_kv_cache_bytes", state="archived"),
                scrape.value("vllm:num_requests_running"),
            ]
            if not any(held):
                return scrape
            assert time.monotonic() < deadline, f"raw bytes, archived bytes, running: {held}"
            time.sleep(0.1)

    def log_tail(self, lines: int = 60) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """End the server and every process it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(timeout=20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def serve(
    folder: Path,
    arguments: Sequence[str] = COMPRESSED,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Server]:
    """SmolLM2 behind `vllm serve`, compressed as k8v4; its log lies in `folder`."""
    binaries = Path(sys.executable).parent
    environment = {
        **os.environ,
        **environment,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_PLUGINS": "kvpca",  # without it vLLM loads no routes of plugins
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
    }
    port, log = free_port(), folder / "server.log"
    command = [binaries / "vllm", "serve", ensure(ModelName.smollm2), *arguments]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*map(str, command), "--host", "127.0.0.1", "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
    server = Server(port, log, process)
    try:
        server.wait_until_healthy()
        yield server
        if process.poll() is not None:
            print(f"the server died (exit code {process.returncode}):\n{server.log_tail()}")
    finally:
        server.stop()
