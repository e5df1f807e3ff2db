"""What all result tables share: cells, and one table in Markdown from the records of its kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab.engine import STOCK
from vllm_kvpca.lab.peers import PEERS
from vllm_kvpca.lab.record import Record

Rows = Callable[[Record], list[list[str]]]
"""The lines that one record makes."""

RATIOS_HEAD = "raw / archived bytes of K and V (of V alone)"
PRESET_HEADS = ["preset", RATIOS_HEAD]
THRESHOLDS_HEAD = "compress after / keep recent"


def _all(chosen: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    return list(chosen)


@dataclass(frozen=True)
class Table:
    """A kind of table.

    Attributes:
        heads: of the columns, or what makes them from the first record.
        rows: what makes the lines of a record.
        command: makes a record for it.
        kind: of the records that are shown; None is the table's name.
        choose: of the records of that kind and model, and of all records, those to show, with
            what is shown of them.
    """

    heads: list[str] | Callable[[Record], list[str]]
    rows: Rows
    command: str
    kind: str | None = None
    choose: Callable[[Sequence[Record], Sequence[Record]], list[Record]] = _all


def render(name: str, table: Table, records: Sequence[Record], model: str | None = None) -> str:
    """One table in Markdown: the rows of each record, then how the numbers were made.

    Args:
        model: only records of the model whose name ends so.

    Raises:
        OptionsError: there is no record for it.
    """
    chosen = sorted((r for r in records if r.kind == (table.kind or name)), key=_order)
    chosen = [record for record in chosen if model in (None, record.model.rpartition("/")[2])]
    chosen = table.choose(chosen, records)
    if not chosen:
        of_model = f" of {model}" if model else ""
        raise OptionsError(
            f"no record{of_model} for the table {name!r}: make one with {table.command}."
        )
    heads = table.heads(chosen[0]) if callable(table.heads) else table.heads
    lines = [_line(heads), _line(["---"] + ["---:"] * (len(heads) - 1))]
    lines += [_line(row) for record in chosen for row in table.rows(record)]
    return "\n".join([*lines, "", *_origin(chosen)]) + "\n"


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


def one_row(row: Callable[[Record], list[str]]) -> Rows:
    """Of a kind whose records make a line each."""
    return lambda record: [row(record)]


def stored(record: Record) -> list[str]:
    """Preset, and its ratio of K and V together, with that of V alone beside it."""
    settings: Any = record.settings
    name = f"`{settings['preset']}`"
    if settings["preset"] == STOCK:
        name = f"stock, steps of {settings['max_num_batched_tokens']:,} tokens"
    return [name, ratios(settings)]


def ratios(about: Any) -> str:
    """The ratio of K and V together, with that of V alone beside it."""
    return f"{about['total_ratio']:.2f}x ({about['v_ratio']:.2f}x)"


def change(results: Any) -> str:
    """The change of perplexity with its 95 % interval."""
    low, high = results["perplexity_change_ci95"]
    return f"{results['perplexity_change']:+.2%} ({low:+.2%} to {high:+.2%})"


def after_and_recent(record: Record) -> str:
    if record.settings["preset"] in PEERS:
        return ""
    return f"{record.settings['compress_after']} / {record.settings['keep_recent']}"


def columns(record: Record, key: str) -> list[str]:
    """What a record's rows have under a key, each once."""
    results: Any = record.results
    return list(dict.fromkeys(row[key] for row in results["rows"]))


def lines(record: Record, key: str, cell: Callable[[Any], str]) -> list[list[str]]:
    """A line for each value of a key: the value, then a cell for each row that has it."""
    results: Any = record.results
    found: dict[str, list[str]] = {}
    for row in results["rows"]:
        found.setdefault(row[key], []).append(cell(row))
    return [[name, *cells] for name, cells in found.items()]
