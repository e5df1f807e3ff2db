"""The dashboard and the rules name only what exists, and the committed file is fresh.

That every panel shows data from a real server is the work of tests/e2e/check_dashboards.py.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.lab.dashboards import panels
from vllm_kvpca.metrics import METRICS

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    for part in ("grafana", "prometheus", "helm"):
        shutil.copytree(DEPLOY / part, tmp_path / part)
    return tmp_path


def run(deploy: Path, *arguments: str):
    return CliRunner().invoke(app, ["dashboards", "--deploy", str(deploy), *arguments])


def test_the_committed_dashboard_is_fresh_and_every_metric_exists():
    result = run(DEPLOY, "--check")
    assert result.exit_code == 0, result.output


def test_check_finds_a_stale_dashboard(deploy: Path):
    path = deploy / "grafana" / "vllm-kvpca.json"
    path.write_text(path.read_text().replace("percentunit", "percent"))
    result = run(deploy, "--check")
    assert result.exit_code == 1
    assert "run vllm-kvpca dashboards" in result.stderr


def test_the_charts_copy_of_the_rules_goes_stale_too(deploy: Path):
    rules = deploy / "prometheus" / "rules.yaml"
    rules.write_text(rules.read_text().replace("0.95", "0.9"))
    result = run(deploy, "--check")
    assert result.exit_code == 1
    assert "helm" in result.stderr and "rules.yaml is stale" in result.stderr.replace("\n", "")


@pytest.mark.parametrize("wrong", ["kvpca_archived_tokens", "kvpca_kv_cache_bites"])
def test_a_rule_on_a_metric_that_does_not_exist_is_refused(deploy: Path, wrong: str):
    rules = deploy / "prometheus" / "rules.yaml"
    right = "kvpca_archived_tokens_total" if "archived" in wrong else "kvpca_kv_cache_bytes"
    rules.write_text(rules.read_text().replace(right, wrong))
    result = run(deploy, "--check")
    assert result.exit_code == 1
    assert wrong in result.stderr


@pytest.mark.parametrize("panel", list(panels()), ids=lambda panel: panel.title)
def test_a_panel_says_which_metrics_it_shows_and_obeys_the_variables(panel):
    for query in panel.queries:
        names = re.findall(r"\b(?:kvpca_|vllm:)[a-z_]+", query.expr)
        assert names
        for name in names:
            assert f"`{name.removesuffix('_bucket')}`" in panel.text
        for variable in ("job", "instance", "model_name", "engine"):
            assert query.expr.count(f'{variable}=~"${variable}"') == len(names)


def test_every_metric_is_on_the_dashboard():
    shown = " ".join(query.expr for panel in panels() for query in panel.queries)
    assert [metric.name for metric in METRICS if metric.name not in shown] == []


def test_panels_do_not_overlap_and_the_datasource_is_a_choice():
    dashboard = json.loads((DEPLOY / "grafana" / "vllm-kvpca.json").read_text())
    taken = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not taken & cells and at["x"] + at["w"] <= 24
        taken |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
