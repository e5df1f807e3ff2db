"""Result tables of the documentation, generated from records between two markers:

<!-- table:quality -->
...
<!-- /table -->

A model's name after the kind, as in table:quality gemma-3-270m, leaves out the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import measurements
from vllm_kvpca.lab.docs import which_preset
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table, render


def _tables() -> dict[str, Table]:
    """The tables of every measurement, and the one that is put together from several."""
    names = (module.name for module in iter_modules(measurements.__path__))
    modules = [import_module(f"{measurements.__name__}.{name}") for name in names]
    return {
        name: table
        for module in (*modules, which_preset)
        for name, table in getattr(module, "TABLES", {}).items()
    }


TABLES = _tables()
_MARKED = re.compile(
    r"(<!-- table:(?P<kind>[a-z-]+)(?: (?P<model>\S+))? -->\n).*?(<!-- /table -->)", re.DOTALL
)


def update(text: str, records: Sequence[Record]) -> str:
    """The text with every marked table made anew.

    Raises:
        OptionsError: a marker names no table, or there is no record for it.
    """
    return _MARKED.sub(lambda m: m[1] + table(m["kind"], records, m["model"]) + m[4], text)


def stale(paths: Sequence[Path], records: Sequence[Record]) -> list[Path]:
    """Files whose tables differ from the records."""
    return [path for path in paths if update(path.read_text(), records) != path.read_text()]


def table(kind: str, records: Sequence[Record], model: str | None = None) -> str:
    """One table in Markdown; see table.render."""
    if kind not in TABLES:
        raise OptionsError(f"there is no table {kind!r}; known: {', '.join(TABLES)}.")
    return render(kind, TABLES[kind], records, model)
