"""`vllm-kvpca tables`: the result tables of the documentation, from records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vllm_kvpca.cli.evaluate import RECORDS
from vllm_kvpca.errors import OptionsError

_NAMES = ("README.md", "docs/results.md", "docs/calibration.md", "docs/deploy.md", "docs/codec.md")
FILES = [Path(name) for name in _NAMES]


def tables(
    files: Annotated[
        list[Path] | None, typer.Argument(help="Files with tables; by default the documentation.")
    ] = None,
    records: Annotated[Path, typer.Option(help="Folder of records.")] = RECORDS,
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; fail if a table is stale.")
    ] = False,
) -> None:
    """Write the result tables between their markers."""
    from vllm_kvpca.lab.docs.tables import stale, update
    from vllm_kvpca.lab.record import load_all

    paths = files or [path for path in FILES if path.exists()]
    found = load_all(records)
    outdated = stale(paths, found)
    if check and outdated:
        raise OptionsError(
            f"stale tables in {', '.join(map(str, outdated))}: run vllm-kvpca tables."
        )
    for path in outdated:
        path.write_text(update(path.read_text(), found))
        print(path)
