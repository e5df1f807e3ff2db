"""Second moments to a preset: bases and configuration."""

from __future__ import annotations

import torch

from vllm_kvpca.calibration.collect import AttentionShape, Moments
from vllm_kvpca.codec import pca_basis
from vllm_kvpca.errors import CalibrationError, LayoutError
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS, FORMATS
from vllm_kvpca.preset.schema import ModelShape, PresetConfig


def check_format(name: str) -> None:
    """Refuse a format that cannot be calibrated.

    Raises:
        CalibrationError: it needs no calibration, or there is none of that name.
    """
    if name in FORMATS:
        raise CalibrationError(
            f"format {name!r} needs no calibration: serve any model with "
            f"--kv-compression-preset {name}."
        )
    if name not in CALIBRATED_FORMATS:
        raise CalibrationError(
            f"there is no format {name!r} to calibrate: use {' or '.join(CALIBRATED_FORMATS)}."
        )


def wanted(config: PresetConfig) -> list[str]:
    """Which of "k" and "v" the format needs a basis for."""
    return [which for which in "kv" if getattr(config, which).basis == "pca"]


def preset_config(
    name: str, model: str, revision: str | None, shape: AttentionShape
) -> PresetConfig:
    """Configuration of a preset of format `name`, before any text is read.

    Raises:
        CalibrationError: the format's bands do not fit the model's heads.
    """
    description, k, v = CALIBRATED_FORMATS[name]
    try:
        for tensor in (k, v):
            tensor.resolve(shape.head_dim)
    except LayoutError as error:
        raise CalibrationError(
            f"format {name!r} does not fit heads of {shape.head_dim} dimensions: {error}"
        ) from error
    return PresetConfig(
        format=name,
        description=description,
        k=k,
        v=v,
        model=ModelShape(
            name=model,
            revision=revision,
            num_layers=shape.num_layers,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        ),
        layers=None if len(shape.layers) == shape.num_layers else shape.layers,
    )


def fit_bases(moments: Moments) -> dict[str, torch.Tensor]:
    """Bases from second moments.

    Returns:
        "k", "v" to (layers, kv_heads, head_dim, head_dim) float32, for what was collected.

    Raises:
        CalibrationError: the model computed NaN or infinity.
    """
    bases = {}
    for which in moments.sums:
        mean = moments.mean(which)
        if not torch.isfinite(mean).all():
            raise CalibrationError(
                f"the model computes NaN or infinity in {which.upper()}: try --dtype float32, and "
                "check that the model's weights are whole."
            )
        bases[which] = pca_basis(mean)
    return bases


def band_energy(
    moments: Moments, bases: dict[str, torch.Tensor], config: PresetConfig
) -> dict[str, list[float]]:
    """Share of E[|x|^2] that falls into each band, averaged over layers and KV heads."""
    shares: dict[str, list[float]] = {}
    for which, basis in bases.items():
        columns = basis.double()
        energy = (columns * (moments.mean(which) @ columns)).sum(-2)
        energy = (energy / energy.sum(-1, keepdim=True)).mean((0, 1))
        widths = [band.width for band in getattr(config, which).resolve(basis.shape[-1])]
        shares[which] = [float(part.sum()) for part in energy.split(widths)]
    return shares
