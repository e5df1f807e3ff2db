"""`vllm-kvpca api-docs`: the reference page, from the code it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_kvpca.errors import OptionsError

PAGE = Path("docs/api.md")


def api_docs(
    output: Annotated[Path, typer.Option(help="The page to write.")] = PAGE,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail if the page is stale.")
    ] = False,
) -> None:
    """Write the page that documents options, Python names, errors and commands."""
    from vllm_kvpca.cli.main import app
    from vllm_kvpca.lab.docs.api import page

    text = page(app)
    fresh = output.exists() and output.read_text() == text
    if check and not fresh:
        raise OptionsError(f"{output} is stale: run vllm-kvpca api-docs.")
    if not fresh:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text)
        print(output)
