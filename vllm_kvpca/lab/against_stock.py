"""What all measurements against stock share: their records, and what is measured already."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vllm_kvpca.calibration import overlap
from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import presets
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.peers import PEERS
from vllm_kvpca.lab.record import (
    Record,
    command_line,
    load_all,
    make_record,
    source_state,
)
from vllm_kvpca.preset import load_preset, preset_folder
from vllm_kvpca.preset.find import TEXTS_FILE

Thresholds = tuple[int, int]
"""compress_after, keep_recent."""

ENGINE, TRANSFORMERS = "engine", "transformers"
"""What a measurement goes through: the served engine, or transformers with load_preset_cache."""

Done = Callable[[EngineSettings], bool]
"""Whether the record of a preset with these settings is there already."""


def nothing_done(settings: EngineSettings) -> bool:
    return False


def finished(folder: Path, kind: str) -> Done:
    """What this very command has already measured, from its records.

    Only records of the same command line, made from the same commit without changes, count.
    """
    commit, dirty = source_state()
    if commit is None or dirty:
        return nothing_done
    have = {
        _key(record.settings)
        for record in load_all(folder, kind)
        if (record.commit, record.dirty, record.command) == (commit, False, command_line())
    }

    def done(settings: EngineSettings) -> bool:
        return _key(settings.model_dump() | {"preset": presets.label(settings.preset)}) in have

    return done


def _key(settings: dict[str, Any]) -> tuple[Any, ...]:
    names = ("preset", "compress_after", "keep_recent", "dtype", "max_num_batched_tokens")
    return tuple(settings[name] for name in names)


def variants(
    common: EngineSettings,
    preset_names: Iterable[str],
    thresholds: Sequence[Thresholds],
    done: Done = nothing_done,
) -> list[EngineSettings]:
    """`common` with each preset and pair of thresholds, but for what is done.

    To peers thresholds mean nothing: each is measured once, with the first pair.
    """
    every = [
        common.model_copy(update={"preset": name, "compress_after": after, "keep_recent": recent})
        for name in preset_names
        for after, recent in (thresholds[:1] if name in PEERS else thresholds)
    ]
    return [settings for settings in every if not done(settings)]


def parse_thresholds(text: str) -> Thresholds:
    """ "512:256" to (512, 256).

    Raises:
        OptionsError: anything else.
    """
    after, colon, recent = text.partition(":")
    if not (colon and after.isdigit() and recent.isdigit()):
        raise OptionsError(f"{text!r} is no pair of thresholds: write AFTER:RECENT, e.g. 512:256.")
    return int(after), int(recent)


def check_through(through: str) -> None:
    """Refuse anything but ENGINE and TRANSFORMERS."""
    if through not in (ENGINE, TRANSFORMERS):
        raise OptionsError(f"--through {through} is not known: use {ENGINE} or {TRANSFORMERS}.")


def overlaps(preset_names: Iterable[str], files: Sequence[Path]) -> dict[str, float | None]:
    """Share of the text that each preset was calibrated on; see calibration.overlap.check.

    Raises:
        CalibrationError: one of them was calibrated on too much of it.
    """
    return {name: _overlap(name, files) for name in preset_names}


def overlaps_of_texts(preset_names: Iterable[str], texts: Iterable[str]) -> dict[str, float | None]:
    """The same for texts that are in no file of their own, as those of benchmarks."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "benchmark.txt"
        path.write_text("\n".join(texts), encoding="utf-8")
        return overlaps(preset_names, [path])


def _overlap(name: str, files: Sequence[Path]) -> float | None:
    if name in PEERS:
        return 0.0
    calibrated = load_preset(name).config.calibrated
    folder = preset_folder(name)
    share = overlap.check(name, folder, files) if folder else 0.0
    if share is None and calibrated:
        warnings.warn(
            f"preset {name!r} has no {TEXTS_FILE}: only whole files could be compared with the "
            "text it was calibrated on.",
            stacklevel=2,
        )
    return share if calibrated else share or 0.0


def record_of(
    kind: str,
    settings: EngineSettings,
    results: dict[str, Any],
    chosen: dict[str, Any],
    files: Sequence[Path] = (),
    *slug_parts: str,
) -> Record:
    """A record of one preset against stock.

    Args:
        settings: of the engine with the preset.
        chosen: what else was chosen, beside `settings`.
        files: texts that were read.
        slug_parts: what tells the record from others of this preset and these thresholds.
    """
    facts = presets.facts(settings.preset, settings.model)
    used = settings.model_dump(exclude={"model", "seed"}) | facts | chosen
    thresholds = f"{settings.compress_after}-{settings.keep_recent}"
    parts = [facts["preset"], thresholds, *slug_parts]
    return make_record(kind, parts, settings.model, used, results, files, settings.seed)
