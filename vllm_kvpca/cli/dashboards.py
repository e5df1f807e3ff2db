"""`vllm-kvpca dashboards`: the Grafana dashboard, and a check of all that names our metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_kvpca.errors import OptionsError

FILE = "grafana/vllm-kvpca.json"
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
    """Write the Grafana dashboard; refuse metrics that do not exist, also in alert rules."""
    from vllm_kvpca.dashboards import panels, render, undefined

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
    stale = not path.exists() or path.read_text() != fresh
    if check and stale:
        raise OptionsError(f"{path} is stale: run vllm-kvpca dashboards.")
    if stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(fresh)
        print(path)
