"""Whether a calibrated preset is for the model that is served: by its weights, not by its name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vllm_kvpca.errors import PresetMismatch
from vllm_kvpca.preset.formats import FORMATS
from vllm_kvpca.preset.names import same_family, same_model
from vllm_kvpca.preset.schema import PresetConfig
from vllm_kvpca.preset.weights import NotComparable, Quantized, WeightSamples, of_checkpoint

SAME = 0.005
"""Relative difference up to which weights are the same: rounding to bfloat16 makes 0.0017."""
NEAR = 0.25
"""Up to here they have one origin: rounding to 4 bits makes about 0.1, a fine-tune less."""


@dataclass(frozen=True)
class Served:
    """A model about to be served.

    Attributes:
        name: a folder or a Hub name.
        revision: of the Hub, None for its main branch.
        download_dir: where vLLM was told to keep what it downloads, None for the Hub's cache.
        aliases: other names under which the model's own configuration knows it.
    """

    name: str
    revision: str | None = None
    download_dir: str | None = None
    aliases: tuple[str, ...] = ()

    @property
    def folder(self) -> Path | None:
        """Where its files are on this machine, None if they are not (yet). The Hub's cache may hold
        a model's configuration long before its weights."""
        if os.path.isdir(os.path.expanduser(self.name)):
            return Path(self.name).expanduser()
        folder = _in_hub_cache(self.name, self.revision, self.download_dir)
        return folder if folder and any(folder.glob("*.safetensors")) else None


def check_weights(
    name: str,
    config: PresetConfig,
    samples: WeightSamples | None,
    model: Served,
    allow_other: bool = False,
    later: bool = False,
) -> str | None:
    """Refuse a model whose weights are not those that a preset was calibrated on.

    The weights decide where both sides have comparable ones; else the name does, and a quantized
    checkpoint may have a suffix to its name.

    Args:
        name: the preset, for messages.
        samples: the preset's.
        allow_other: the user takes other weights of the same shape: a fine-tune, say.
        later: whether this is asked again once the model's files have been downloaded.

    Returns:
        A warning for the log, None if there is nothing to say.

    Raises:
        PresetMismatch: with how far the weights are apart and the way out.
    """
    if not config.calibrated or config.model is None:
        return None
    made_for = config.model.name
    try:
        difference = _difference(config, samples, model)
    except NotComparable as reason:
        if later and samples is not None and model.folder is None:
            return None
        names = (model.name, *model.aliases)
        same = same_family if isinstance(reason, Quantized) else same_model
        if any(same(made_for, one) for one in names):
            return None if samples is None else _by_name(name, made_for, str(reason))
        what = (
            f"was calibrated for {made_for}, and whether {model.name!r} is that model cannot be "
            f"seen, because {reason}"
        )
    else:
        if difference <= SAME:
            return None
        assert samples is not None
        if difference <= NEAR and samples.quantized:
            return (
                f"Preset {name} was calibrated on weights of {made_for} that were unpacked from "
                f"{samples.quantized}; those of {model.name} differ from them by {difference:.1%}."
            )
        kind = "a fine-tune, or quantized" if difference <= NEAR else "another model"
        what = (
            f"was calibrated on other weights: those of {model.name!r} differ from the ones of "
            f"{made_for} by {difference:.1%} ({kind})"
        )
    if allow_other:
        return f"Preset {name} {what}. It is served all the same, as asked; measure what it costs."
    raise PresetMismatch(
        f"preset {name!r} {what}. Calibrate one for this model (vllm-kvpca calibrate --model "
        f"{model.name} --format {config.format} --text FILES --output DIR), use a calibration-free "
        f"format ({', '.join(FORMATS)}), or take it as it is with --kv-allow-other-weights "
        "(allow_other_weights=True)."
    )


def _by_name(name: str, made_for: str, reason: str) -> str:
    return (
        f"Preset {name} is taken for {made_for} by the model's name alone: its weights cannot be "
        f"compared, because {reason}."
    )


def _difference(config: PresetConfig, samples: WeightSamples | None, model: Served) -> float:
    if samples is None:
        raise NotComparable("the preset holds no samples of weights")
    folder = model.folder
    if folder is None:
        raise NotComparable("its files are not on this machine")
    assert config.model is not None
    return samples.difference(of_checkpoint(folder, config.covered, config.model.width))


def fits(config: PresetConfig, samples: WeightSamples | None, model: Served) -> bool:
    """Whether `check_weights` takes the model without being told to."""
    try:
        check_weights("", config, samples, model)
    except PresetMismatch:
        return False
    return True


def _in_hub_cache(name: str, revision: str | None, cache_dir: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                allow_patterns=["*.safetensors", "*.json"],
                local_files_only=True,
            )
        )
    except Exception:  # no Hub name, never downloaded, no such revision: not here, all the same
        return None
