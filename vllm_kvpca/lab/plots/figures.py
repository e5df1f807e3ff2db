"""The figures of the documentation: which there are, from which records, and whether their files
are up to date. Each is drawn for a light and for a dark page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_kvpca.lab.extra import need
from vllm_kvpca.lab.plots.dashboard import draw_dashboard
from vllm_kvpca.lab.plots.memory import draw_block_life, draw_memory
from vllm_kvpca.lab.plots.needle import draw_needle
from vllm_kvpca.lab.plots.quality import by_format, by_model, draw_frontier, draw_models, draw_sizes
from vllm_kvpca.lab.plots.speed import draw_speed
from vllm_kvpca.lab.plots.spread import draw_spread
from vllm_kvpca.lab.plots.themes import THEMES, Theme, checksum, origin, save
from vllm_kvpca.lab.record import Record

_SMALL = 80
"""Dots per inch of a figure with many panels."""


class Figure(NamedTuple):
    """One file for each theme: name-light.png, name-dark.png."""

    name: str
    records: list[Record]
    draw: Callable[[Sequence[Record], Theme], Any]
    dpi: int | None = None

    def path(self, folder: Path, theme: Theme) -> Path:
        return folder / f"{self.name}-{theme.name}.png"


COMMANDS = {
    "memory": "vllm-kvpca evaluate memory",
    "block-life": "vllm-kvpca evaluate block-life",
    "frontier": "vllm-kvpca evaluate quality",
    "perplexity": "vllm-kvpca evaluate quality",
    "model-size": "vllm-kvpca evaluate quality, with a preset of one format on two models",
    "spread": "vllm-kvpca calibrate --records benchmarks/records",
    "needle": "vllm-kvpca evaluate needle",
    "recall": "vllm-kvpca evaluate recall",
    "decode-speed": "vllm-kvpca bench kernels",
    "dashboard": "make test-dashboards",
}
"""Kinds of figures, and what makes a record for each."""


def figures(records: Sequence[Record]) -> list[Figure]:
    """Every figure for which there are records."""
    return list(_figures(records))


def _figures(records: Sequence[Record]) -> Iterator[Figure]:
    def of(*kinds: str) -> list[Record]:
        return [record for record in records if record.kind in kinds]

    for record in of("memory"):
        yield Figure(f"memory-{_short(record)}", [record], draw_memory)
    for record in of("block-life"):
        yield Figure(f"block-life-{record.settings['preset']}", [record], draw_block_life)
    quality = [r for r in of("quality") if r.settings["compress_after"] == 0]
    for chosen in by_model([*quality, *of("codec-study")]).values():
        studies = [record for record in chosen if record.kind == "codec-study"]
        yield Figure(f"frontier-{_short(chosen[0])}", studies or chosen, draw_frontier)
    if quality:
        yield Figure("perplexity", quality, draw_models)
    for chosen in (of("codec-study"), quality):
        if by_format(chosen):
            yield Figure("model-size", chosen, draw_sizes)
            break
    for record in of("calibration"):
        yield Figure(f"spread-{_short(record)}", [record], draw_spread)
    for kind in ("needle", "recall"):
        for chosen in by_model([r for r in of(kind) if r.settings["through"] == "engine"]).values():
            yield Figure(f"{kind}-{_short(chosen[0])}", chosen, draw_needle)
    for record in of("kernels"):
        yield Figure("decode-speed", [record], draw_speed)
    for record in of("dashboard"):
        yield Figure("dashboard", [record], draw_dashboard, _SMALL)


def _short(record: Record) -> str:
    return record.model.rpartition("/")[2].lower()


def draw_all(records: Sequence[Record], folder: Path) -> list[Path]:
    """Draw every figure for which there are records; returns the files written.

    Raises:
        SetupError: matplotlib or pillow is not installed.
    """
    need("matplotlib", "PIL")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures(records):
        for theme in THEMES:
            path = figure.path(folder, theme)
            more = {"dpi": figure.dpi} if figure.dpi else {}
            save(figure.draw(figure.records, theme), path, figure.records, **more)
            paths.append(path)
    return paths


def missing(records: Sequence[Record]) -> list[str]:
    """Kinds of figures for which there is no record, each with what makes one."""
    names = [figure.name for figure in figures(records)]
    return [
        f"{kind}: {command}"
        for kind, command in COMMANDS.items()
        if not any(name == kind or name.startswith(f"{kind}-") for name in names)
    ]


def problems(records: Sequence[Record], folder: Path) -> list[str]:
    """What is wrong with a folder of figures: not drawn, drawn from other records, or without.

    Raises:
        SetupError: pillow is not installed.
    """
    need("PIL")
    found = []
    expected = {
        figure.path(folder, theme): figure for figure in figures(records) for theme in THEMES
    }
    for path, figure in expected.items():
        if not path.exists():
            found.append(f"{path} is not drawn")
        elif origin(path) != checksum(figure.records):
            found.append(f"{path} was drawn from other records")
    found += [f"{path} has no record" for path in folder.glob("*.*") if path not in expected]
    return found
