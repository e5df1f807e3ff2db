"""The page of metrics: it says what /metrics publishes, and the committed one is fresh."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.metrics import METRICS, shown_name

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def run(page: Path, *arguments: str):
    return CliRunner().invoke(app, ["metrics-docs", "--output", str(page), *arguments])


def test_the_committed_page_is_fresh():
    result = run(PAGE, "--check")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.key)
def test_the_page_has_each_metric_with_its_name_on_the_wire_and_its_help(metric):
    rows = PAGE.read_text().splitlines()
    (row,) = [line for line in rows if line.startswith(f"| `{shown_name(metric)}`")]
    assert metric.help in row
    assert all(f"`{label}`" in row for label in metric.labels)


def test_check_finds_a_stale_page_and_leaves_it_alone(tmp_path: Path):
    page = tmp_path / "metrics.md"
    assert run(page).exit_code == 0
    assert run(page, "--check").exit_code == 0
    stale = page.read_text().replace("archived tokens", "archived bytes")
    page.write_text(stale)
    result = run(page, "--check")
    assert result.exit_code == 1
    assert "run vllm-kvpca metrics-docs" in result.stderr
    assert page.read_text() == stale
    run(page)
    assert run(page, "--check").exit_code == 0
