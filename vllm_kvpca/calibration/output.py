"""The folders that presets are written to: looked at before any text is read, filled at the end."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from vllm_kvpca.calibration import resume
from vllm_kvpca.calibration.card import Source, write_card
from vllm_kvpca.calibration.collect import Moments
from vllm_kvpca.calibration.fit import band_energy, fit_bases, wanted
from vllm_kvpca.errors import OptionsError
from vllm_kvpca.preset import save_preset
from vllm_kvpca.preset.find import CONFIG_FILE
from vllm_kvpca.preset.schema import PresetConfig
from vllm_kvpca.preset.weights import WeightSamples
from vllm_kvpca.whole_files import PREFIX


def folders(output: Path, formats: Sequence[str]) -> dict[str, Path]:
    """Each format's folder: `output` itself, or with several formats one below it for each."""
    if len(formats) == 1:
        return {formats[0]: output}
    return {name: output / name for name in formats}


def check(
    output: Path, targets: Iterable[Path], overwrite: bool, own: Collection[str] = ()
) -> None:
    """Refuse folders that hold what must not be lost.

    Args:
        output: what --output names.
        targets: the folders of presets: `output`, or folders below it.
        overwrite: whether presets may be replaced.
        own: names of files that a run which was cut off leaves, beside those of any run.

    Raises:
        OptionsError: one is a file, or holds something else than a preset, or a preset.
    """
    targets = list(targets)
    for folder in {output: None, **dict.fromkeys(targets)}:
        if folder.is_file():
            raise OptionsError(f"--output {folder} is a file: name a folder.")
    if output not in targets and (output / CONFIG_FILE).exists():
        raise OptionsError(
            f"--output {output} holds a preset, and several formats get folders below --output: "
            "name another folder."
        )
    for folder in targets:
        _check_one(folder, overwrite, {resume.FILE, *own})


def _check_one(folder: Path, overwrite: bool, own: Collection[str]) -> None:
    if not folder.exists():
        return
    if all(path.name in own or path.name.startswith(PREFIX) for path in folder.iterdir()):
        return
    if not (folder / CONFIG_FILE).exists():
        raise OptionsError(f"--output {folder} holds something else: name another folder.")
    if not overwrite:
        raise OptionsError(
            f"--output {folder} holds a preset: name another folder, or add --overwrite."
        )


def write(
    presets: Mapping[Path, PresetConfig],
    moments: Moments,
    source: Source,
    texts: str,
    weights: WeightSamples | None = None,
) -> None:
    """Fit and write presets. All are fitted before the first is written.

    Args:
        presets: folder to configuration.
        moments: of what `fit.wanted` names for each of them, at least.
        source: for the cards.
        texts: text of calibration.json (see `overlap.to_json`).
        weights: of the model.

    Raises:
        CalibrationError: the model computed NaN or infinity.
        OutputError: a preset cannot be written; those before it are.
    """
    fitted = {}
    for folder, config in presets.items():
        own = moments.only(wanted(config))
        bases = fit_bases(own, config)
        fitted[folder] = bases, write_card(config, source, band_energy(own, bases, config))
    for folder, (bases, card) in fitted.items():
        save_preset(folder, presets[folder], bases, card, texts, weights)


def as_preset(folder: Path) -> str:
    """A folder as it is given to --kv-compression-preset: a bare name would be no folder."""
    return f"./{folder}" if len(folder.parts) == 1 and not folder.is_absolute() else str(folder)
