"""`vllm-kvpca plot`: figures of the documentation, from records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_kvpca.cli.evaluate import RECORDS
from vllm_kvpca.errors import OptionsError


def plot(
    records: Annotated[Path, typer.Option(help="Folder of records.")] = RECORDS,
    output: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("docs/images"),
    everything: Annotated[
        bool, typer.Option("--all", help="Fail if a kind of figure has no record.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Draw nothing; fail if a figure is missing, stale or has no record."
        ),
    ] = False,
) -> None:
    """Draw the figures for which there are records, for light and dark pages, as PNG."""
    from vllm_kvpca.lab.plots.figures import draw_all, figures, missing, problems
    from vllm_kvpca.lab.record import load_all

    found = load_all(records)
    if check:
        if wrong := problems(found, output):
            raise OptionsError(f"{'; '.join(wrong)}. Run vllm-kvpca plot.")
        return
    without = missing(found)
    if without and (everything or not figures(found)):
        raise OptionsError(f"{records} has no record for these figures: {'; '.join(without)}.")
    for path in draw_all(found, output):
        print(path)
