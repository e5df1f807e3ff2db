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
) -> None:
    """Draw the figures of all records, for light and dark pages, as SVG and PNG."""
    from vllm_kvpca.evaluation.record import load_all
    from vllm_kvpca.plots.figures import draw_all

    paths = draw_all(load_all(records), output)
    if not paths:
        raise OptionsError(
            f"{records} holds no record that can be drawn: make one with "
            "vllm-kvpca evaluate block-life."
        )
    for path in paths:
        print(path)
