"""Choose a format for a model: the least loss at a ratio, or the highest ratio at a loss.

Bases are fitted on the first part of the text, losses measured on the rest of it with every token
stored (see `strict`). All layers get one format: the server's pages of one kind have one size, so
a layer in fewer bytes would save nothing. Results are kept in tune.json in the output folder as
they come, and a run that was cut off goes on from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvpca.calibration import statistics
from vllm_kvpca.calibration.collect import AttentionShape, Moments
from vllm_kvpca.calibration.fit import fit_bases, preset_config, wanted
from vllm_kvpca.calibration.strict import target_logprobs
from vllm_kvpca.errors import CalibrationError, LayoutError, OptionsError
from vllm_kvpca.preset import FORMATS, Preset
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS
from vllm_kvpca.whole_files import whole_files

STATE_FILE = "tune.json"
Advance = Callable[[int], None]
Result = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """What is asked for: exactly one of the two.

    Attributes:
        ratio: total ratio that the format must reach.
        ppl_delta: relative change of perplexity that it must not exceed; 0.01 is 1 %.
    """

    ratio: float | None = None
    ppl_delta: float | None = None

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.ppl_delta is None):
            raise OptionsError("give either --target-ratio or --target-ppl-delta.")
        if self.ratio is not None and self.ratio <= 1:
            raise OptionsError(f"--target-ratio {self.ratio:g} saves nothing: give more than 1.")
        if self.ppl_delta is not None and self.ppl_delta < 0:
            raise OptionsError(f"--target-ppl-delta {self.ppl_delta:g} is below 0.")


def candidates(
    name: str, revision: str | None, shape: AttentionShape, without_bias: bool = False
) -> list[Preset]:
    """Every format that compresses, fits the model's heads and drops no component (that loses far
    more than the same bytes in mixed bit widths), lowest ratio first; bases are still missing.

    without_bias: see fit.preset_config.
    """
    found = []
    for format_name in [*FORMATS, *CALIBRATED_FORMATS]:
        try:
            if format_name in FORMATS:
                config = FORMATS[format_name]
            else:
                config = preset_config(format_name, name, revision, shape, without_bias)
            ratio = Preset(format_name, config).layout(shape.head_dim).total_ratio
        except (CalibrationError, LayoutError):
            continue  # its bands do not fit these heads
        dropping = any(band.bits == 0 for tensor in (config.k, config.v) for band in tensor.bands)
        if ratio > 1 and not dropping:
            found.append((ratio, Preset(format_name, config)))
    return [preset for _, preset in sorted(found, key=lambda pair: pair[0])]


def moments_wanted(presets: Sequence[Preset]) -> list[str]:
    """Of what second moments are needed to fit all of these."""
    names = {w for p in presets if p.config.calibrated for w in wanted(p.config)}
    return sorted(names)


class Tuner:
    """Measures formats on one model and text, each once.

    Attributes:
        moments: as given.
        results: of each measured format: total_ratio, perplexity_change, its interval.
        layers: of formats measured layer by layer: layer, perplexity_change, its interval.
    """

    def __init__(
        self,
        model: Any,
        shape: AttentionShape,
        moments: Moments,
        windows: Sequence[list[int]],
        folder: Path,
        key: str,
        seed: int = 0,
    ) -> None:
        """
        Args:
            moments: of what `moments_wanted` names.
            windows: to measure on, at least two, of one length.
            folder: where tune.json is kept.
            key: names everything that results depend on; those of another key are dropped.
        """
        self._model, self._shape, self.moments = model, shape, moments
        self._windows, self._seed = windows, seed
        self._path, self._key = folder / STATE_FILE, key
        state = json.loads(self._path.read_text()) if self._path.exists() else {}
        same = state.get("key") == key
        self.results: dict[str, Result] = state["results"] if same else {}
        self.layers: dict[str, list[Result]] = state["layers"] if same else {}
        self._stock: statistics.Floats | None = None

    def fitted(self, candidate: Preset) -> Preset:
        """The candidate with its bases."""
        if not candidate.config.calibrated:
            return candidate
        own = self.moments.only(wanted(candidate.config))
        return Preset(candidate.name, candidate.config, fit_bases(own, candidate.config))

    def measure(self, candidate: Preset, advance: Advance = lambda tokens: None) -> Result:
        """Loss of a format in all layers."""
        if candidate.name not in self.results:
            layout = candidate.layout(self._shape.head_dim)
            self.results[candidate.name] = {
                "total_ratio": layout.total_ratio,
                "v_ratio": layout.v_ratio,
                **self._loss(self.fitted(candidate), self._shape.layers, advance),
            }
            self._save()
        return self.results[candidate.name]

    def per_layer(self, candidate: Preset, advance: Advance = lambda tokens: None) -> list[Result]:
        """Loss of a format in one layer at a time, the others raw."""
        done = self.layers.setdefault(candidate.name, [])
        fitted = self.fitted(candidate)
        for layer in self._shape.layers[len(done) :]:
            done.append({"layer": layer, **self._loss(fitted, [layer], advance)})
            self._save()
        return done

    def _loss(self, preset: Preset, layers: Sequence[int], advance: Advance) -> Result:
        if self._stock is None:
            self._stock = target_logprobs(self._model, self._windows)
        other = target_logprobs(self._model, self._windows, preset, layers, advance)
        return {
            "perplexity_change": statistics.perplexity_change(self._stock, other),
            "perplexity_change_ci95": list(
                statistics.bootstrap_change(self._stock, other, self._seed)
            ),
        }

    def _save(self) -> None:
        state = {"key": self._key, "results": self.results, "layers": self.layers}
        with whole_files(self._path.parent) as new:
            (new / self._path.name).write_text(json.dumps(state, indent=2) + "\n")


def choose(
    presets: Sequence[Preset], head_dim: int, target: Target, measure: Callable[[Preset], Result]
) -> Preset:
    """The format to take.

    For a ratio: of all formats that reach it, the one that loses least. For a loss: formats are
    tried from the highest ratio down until one loses no more.

    Args:
        presets: by ratio, lowest first.
        measure: gives "perplexity_change".

    Raises:
        CalibrationError: no format meets the target, with what the nearest one reaches.
    """
    losses: dict[str, float] = {}
    if target.ratio is not None:
        ratios = [preset.layout(head_dim).total_ratio for preset in presets]
        if not presets or ratios[-1] < target.ratio:
            most = f": {presets[-1].name} has {ratios[-1]:.2f}" if presets else ""
            raise CalibrationError(
                f"no format reaches a total ratio of {target.ratio:g} with heads of {head_dim} "
                f"dimensions{most}. Lower --target-ratio."
            )
        enough = [p for p, ratio in zip(presets, ratios, strict=True) if ratio >= target.ratio]
        losses = {p.name: measure(p)["perplexity_change"] for p in enough}
        return min(enough, key=lambda p: losses[p.name])
    assert target.ppl_delta is not None
    for preset in reversed(presets):
        losses[preset.name] = measure(preset)["perplexity_change"]
        if losses[preset.name] <= target.ppl_delta:
            return preset
    best = min(losses, key=lambda name: losses[name], default="none")
    raise CalibrationError(
        f"no format loses {target.ppl_delta:.2%} or less on this text: {best} loses least"
        f"{f' ({losses[best]:+.2%})' if losses else ''}. Raise --target-ppl-delta."
    )


def key_of(**settings: Any) -> str:
    """A name for everything that results depend on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
