"""Result tables of the documentation, generated from records between two markers:

<!-- table:quality -->
...
<!-- /table -->

A model's name after the kind, as in table:quality gemma-3-270m, leaves out the others.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab.codec_tables import CODEC_TABLES, chosen_records
from vllm_kvpca.lab.measurements.quality import put_beside
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table_kinds import TABLES

_BENCHES = ("kernels", "engine", "memory-limited")
_TABLE = re.compile(
    r"(<!-- table:(?P<kind>[a-z-]+)(?: (?P<model>\S+))? -->\n).*?(<!-- /table -->)", re.DOTALL
)


def update(text: str, records: Sequence[Record]) -> str:
    """The text with every marked table made anew.

    Raises:
        OptionsError: a marker names no table, or there is no record for it.
    """
    return _TABLE.sub(lambda m: m[1] + table(m["kind"], records, m["model"]) + m[4], text)


def stale(paths: Sequence[Path], records: Sequence[Record]) -> list[Path]:
    """Files whose tables differ from the records."""
    return [path for path in paths if update(path.read_text(), records) != path.read_text()]


def table(kind: str, records: Sequence[Record], model: str | None = None) -> str:
    """One table in Markdown: the rows of each record, then how the numbers were made.

    Args:
        model: only records of the model whose name ends so.
    """
    if kind not in TABLES:
        raise OptionsError(f"there is no table {kind!r}; known: {', '.join(TABLES)}.")
    heads, rows = TABLES[kind]
    of_kind = "codec-study" if kind in CODEC_TABLES else kind
    chosen = sorted((r for r in records if r.kind == of_kind), key=_order)
    chosen = [record for record in chosen if model in (None, record.model.rpartition("/")[2])]
    if kind in CODEC_TABLES:
        chosen = chosen_records(CODEC_TABLES[kind], chosen)
    if kind == "quality-transformers":
        chosen = [put_beside(record, records) for record in chosen]
    if not chosen:
        of_model = f" of {model}" if model else ""
        raise OptionsError(
            f"no record{of_model} for the table {kind!r}: make one with {_command(kind)}."
        )
    if callable(heads):
        heads = heads(chosen[0])
    lines = [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1))]
    lines += [_line(row) for record in chosen for row in rows(record)]
    return "\n".join([*lines, "", *_origin(chosen)]) + "\n"


def _command(kind: str) -> str:
    if kind == "quality-transformers":
        return "vllm-kvpca evaluate quality --through transformers"
    if kind == "layouts":
        return "make test-layouts"
    scripts = {
        "load": "serve_load",
        "guidellm": "guidellm_load",
        "metrics-overhead": "metrics_overhead",
        "soak": "soak",
    }
    scripts |= dict.fromkeys(CODEC_TABLES, "codec_study")
    if kind in scripts:
        return f"python benchmarks/{scripts[kind]}.py"
    others = {
        "calibration": "vllm-kvpca calibrate",
        "tune": "vllm-kvpca tune",
        "key-bias": "python benchmarks/key_bias.py",
    }
    if kind in others:
        return others[kind]
    return f"vllm-kvpca {'bench' if kind in _BENCHES else 'evaluate'} {kind}"


def _order(record: Record) -> tuple[Any, ...]:
    settings: Any = record.settings
    return (
        record.model,
        settings.get("total_ratio", 0),
        settings.get("preset", ""),
        settings.get("compress_after", 0),
        record.slug,
    )


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(records: Sequence[Record]) -> list[str]:
    """What made the numbers: one paragraph for each machine, and the commands."""
    machines = dict.fromkeys(_machine(record) for record in records)
    commands = dict.fromkeys(record.command for record in records)
    return [*machines, "", "```", *commands, "```"]


def _machine(record: Record) -> str:
    hardware = record.hardware
    place = hardware.gpu or f"{hardware.cpu}, {_threads(record)}"
    commit = f"commit {record.commit[:10]}" if record.commit else "an installed package"
    with_changes = " with changes" if record.dirty else ""
    return (
        f"{record.model} on {place}; vLLM {record.versions.get('vllm', '?')}, "
        f"torch {record.versions['torch']}; {commit}{with_changes}, {record.date[:10]}."
    )


def _threads(record: Record) -> str:
    bound = record.hardware.threads_bind
    if bound is None or record.kind != "throughput":
        return f"{record.hardware.cores} cores"
    return f"threads bound to core{'s' if re.search('[-,|]', bound) else ''} {bound}"
