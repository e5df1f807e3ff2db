"""`vllm-kvpca dashboards`: the Grafana dashboard, and a check of all that names our metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_kvpca.errors import OptionsError

FILE = "grafana/vllm-kvpca.json"
# A Helm chart can read only files of its own folder.
CHART = "helm/vllm-kvpca/files"
RULES = ("prometheus/rules.yaml", "prometheus/rules_test.yaml")


def dashboards(
    deploy: Annotated[Path, typer.Option(help="Folder with grafana/ and prometheus/.")] = Path(
        "deploy"
    ),
    check: Annotated[
        bool,
        typer.Option("--check", help="Change nothing; fail on a stale file or unknown metric."),
    ] = False,
) -> None:
    """Write the Grafana dashboard, and the Helm chart's copies of it and of the rules; refuse
    metrics that do not exist."""
    from vllm_kvpca.lab.dashboards import panels, render, undefined

    fresh, path = render(), deploy / FILE
    texts = {
        f"panel {panel.title!r}": " ".join(query.expr for query in panel.queries)
        for panel in panels()
    }
    for name in RULES:
        if (deploy / name).exists():
            texts[str(deploy / name)] = (deploy / name).read_text()
    for place, text in texts.items():
        if unknown := undefined(text):
            raise OptionsError(
                f"{place} names metrics that do not exist: {', '.join(unknown)}. "
                "docs/metrics.md lists those that do."
            )
    wanted = {path: fresh, deploy / CHART / path.name: fresh}
    rules = deploy / RULES[0]
    if rules.exists():
        wanted[deploy / CHART / rules.name] = rules.read_text()
    for target, text in wanted.items():
        if target.exists() and target.read_text() == text:
            continue
        if check:
            raise OptionsError(f"{target} is stale: run vllm-kvpca dashboards.")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
        print(target)
