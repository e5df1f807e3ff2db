"""Every panel and rule against a real Prometheus that scrapes a real server with traffic.

Not collected by pytest, because Prometheus is no Python package: `make test-dashboards` runs it
(`apt-get install prometheus` brings the two programs it needs). It fails if a panel has no data,
a value out of the panel's bounds or nothing but zeros, or if an alert fires that should not, and
writes a record from which the picture in the documentation is drawn.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from e2e.server import NAME, Server, free_port, serve  # noqa: E402

from vllm_kvpca.demo_models.catalogue import ModelName  # noqa: E402
from vllm_kvpca.demo_models.folder import ensure  # noqa: E402
from vllm_kvpca.lab.dashboards import SELECTOR, panels  # noqa: E402
from vllm_kvpca.lab.dashboards.panels import WINDOW, Panel  # noqa: E402

SECONDS, CLIENTS, STEP, SEED = 100, 6, 2, 0
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [{rules}]
scrape_configs:
  - job_name: vllm
    static_configs:
      - targets: ["{target}"]
        labels: {{kv_compression: "on"}}
"""


class Prometheus:
    """A running Prometheus and its HTTP API."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: Any) -> Any:
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]

    def range(self, expr: str, start: float, end: float) -> list[tuple[dict, list[list[float]]]]:
        """Labels and [time, value] pairs of each series."""
        data = self.get("query_range", query=expr, start=start, end=end, step=STEP)
        return [
            (series["metric"], [[float(t), float(v)] for t, v in series["values"]])
            for series in data["result"]
        ]


@contextmanager
def prometheus(server: Server, folder: Path) -> Iterator[Prometheus]:
    for program in ("prometheus", "promtool"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is missing: apt-get install prometheus.")
    port = free_port()
    target = server.url.removeprefix("http://")
    rules = ROOT / "deploy" / "prometheus" / "rules.yaml"
    (folder / "prometheus.yaml").write_text(CONFIG.format(rules=rules, target=target))
    command = ["prometheus", f"--config.file={folder}/prometheus.yaml"]
    command += [f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(60):
            try:
                urllib.request.urlopen(f"{url}/-/ready", timeout=2).close()
                break
            except OSError:
                time.sleep(0.5)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(timeout=30)


def send_traffic(server: Server) -> int:
    """Requests of random lengths, some with a prompt that came before; returns how many ended."""
    until, done = time.monotonic() + SECONDS, [0] * CLIENTS

    def client(number: int) -> None:
        dice = random.Random(SEED + number)
        prompts: list[list[int]] = []
        with server.client() as api:
            while time.monotonic() < until:
                fresh = [dice.randrange(1000, 4000) for _ in range(dice.randrange(100, 1400))]
                prompts.append(fresh)
                prompt = dice.choice(prompts) if dice.random() < 0.3 else fresh
                tokens = dice.randrange(20, 150)
                api.completions.create(
                    model=NAME, prompt=prompt, max_tokens=tokens, extra_body={"ignore_eos": True}
                )
                done[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done)


def filled_in(expr: str) -> str:
    """A panel's expression as Grafana sends it with every variable at "All"."""
    values = SELECTOR
    for variable in ("job", "instance", "model_name", "engine"):
        values = values.replace(f"${variable}", ".*")
    return expr.replace(SELECTOR, values).replace(WINDOW, "20s")


def check(panel: Panel, found: Prometheus, start: float, end: float) -> tuple[list, list[str]]:
    """Series of a panel, and what is wrong with them."""
    shown, wrong, moved = [], [], False
    for query in panel.queries:
        series = found.range(filled_in(query.expr), start, end)
        if not series:
            wrong.append(f"{panel.title}: no data for {query.expr}")
        for labels, values in series:
            numbers = [value for _, value in values if not math.isnan(value)]
            moved |= any(value > 0 for value in numbers)
            least, most = panel.sane
            odd = [value for value in numbers if not least <= value <= most]
            if odd or not numbers:
                wrong.append(f"{panel.title}: {query.legend} {labels}: {odd[:3] or 'only NaN'}")
            name = query.legend
            for label, value in labels.items():
                name = name.replace("{{" + label + "}}", value)
            points = [[round(t - start, 1), v] for t, v in values if not math.isnan(v)]
            shown.append({"legend": name, "points": points})
    if panel.moves and not moved:
        wrong.append(f"{panel.title}: nothing but zeros")
    return shown, wrong


def check_rules(found: Prometheus, at: float) -> list[str]:
    """Recording rules have data, no rule fails, and no alert fires on a healthy server."""
    wrong = []
    for group in found.get("rules")["groups"]:
        for rule in group["rules"]:
            if rule["health"] != "ok":
                wrong.append(f"rule {rule['name']}: {rule['health']} {rule.get('lastError')}")
            if rule["type"] == "recording" and not found.range(rule["name"], at - 10, at):
                wrong.append(f"rule {rule['name']} has no data")
            if rule["type"] == "alerting" and rule["state"] != "inactive":
                wrong.append(f"alert {rule['name']} is {rule['state']}")
    return wrong


def main() -> int:
    from vllm_kvpca.lab.record import make_record

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with serve(folder) as server, prometheus(server, folder) as found:
            start = time.time()
            requests = send_traffic(server)
            server.wait_until_idle()
            time.sleep(3)
            end = time.time()
            results: dict[str, Any] = {"requests": requests, "panels": []}
            wrong = check_rules(found, end)
            for panel in panels():
                series, problems = check(panel, found, start, end)
                wrong += problems
                shown = {"title": panel.title, "unit": panel.unit, "stacked": panel.stacked}
                results["panels"].append({**shown, "series": series})
    print("\n".join(wrong) or f"{len(results['panels'])} panels have data, {requests} requests")
    if wrong:
        return 1
    settings = {"seconds": SECONDS, "clients": CLIENTS, "scrape_seconds": 1, "step_seconds": STEP}
    model = str(ensure(ModelName.smollm2))
    record = make_record("dashboard", ["k8v4"], model, settings, results, seed=SEED)
    print(record.model_copy(update={"command": "make test-dashboards"}).write())
    return 0


if __name__ == "__main__":
    sys.exit(main())
