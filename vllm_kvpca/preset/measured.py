"""What shipped presets were measured to cost: `measured.json` beside them, made from records.

The records themselves do not travel in the wheel. `vllm-kvpca presets --from-records` writes this
file and the cards; nothing else does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_kvpca.preset.find import shipped_root

FILE = "measured.json"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Measured:
    """Perplexity of one preset on one model, against stock vLLM on the same text.

    Attributes:
        model: name of the model.
        compress_after, keep_recent: tokens; 0 and 0 archive all they can.
        archived: share of the attended keys that were archived. Less than 1 at 0 and 0 too: the
            tokens of a step are raw in that step.
        change, low, high: relative change of perplexity and its 95 % interval; 0.01 is 1 %.
        tokens: that were predicted.
        record: file name of the record.
    """

    model: str
    dtype: str
    compress_after: int
    keep_recent: int
    archived: float
    change: float
    low: float
    high: float
    tokens: int
    record: str

    @property
    def short(self) -> str:
        """E.g. "+0.17% (+0.06% to +0.28%), 91% of keys archived"."""
        interval = f"{self.change:+.2%} ({self.low:+.2%} to {self.high:+.2%})"
        return f"{interval}, {self.archived:.0%} of keys archived"


def load_measured(root: Path | None = None) -> dict[str, list[Measured]]:
    """Preset names to what was measured, hardest case first; empty if there is no file."""
    path = (root or shipped_root()) / FILE
    if not path.is_file():
        return {}
    found = json.loads(path.read_text())
    return {name: [Measured(**row) for row in rows] for name, rows in found.items()}


def to_json(measured: dict[str, list[Measured]]) -> str:
    """Text of the file."""
    rows = {name: [asdict(row) for row in measured[name]] for name in sorted(measured)}
    return json.dumps(rows, indent=2) + "\n"


def hardest(rows: Sequence[Measured]) -> list[Measured]:
    """For each model the row in which most is archived."""
    first: dict[str, Measured] = {}
    for row in rows:
        first.setdefault(row.model, row)
    return list(first.values())


def describe(rows: Sequence[Measured], with_model: bool) -> str:
    """All rows in one line, for a card; the model's name is left out where the card has it."""
    if not rows:
        return NOT_MEASURED
    return "; ".join(
        f"{row.short} ({f'{row.model}, ' if with_model else ''}{row.dtype}, "
        f"{row.compress_after}/{row.keep_recent}, {row.tokens:,} tokens)"
        for row in rows
    )
