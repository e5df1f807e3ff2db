"""`vllm-kvpca metrics-docs`: the page of metrics, from the table that creates them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_kvpca.errors import OptionsError

PAGE = Path("docs/metrics.md")


def metrics_docs(
    output: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail if the page is stale.")
    ] = False,
) -> None:
    """Write the page that documents the metrics."""
    from vllm_kvpca.lab.docs.metrics import page

    fresh = output.exists() and output.read_text() == page()
    if check and not fresh:
        raise OptionsError(f"{output} is stale: run vllm-kvpca metrics-docs.")
    if not fresh:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(page())
        print(output)
