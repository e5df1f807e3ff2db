"""Second moments to a preset: bases and configuration."""

from __future__ import annotations

import torch

from vllm_kvpca.calibration.collect import AttentionShape, Moments
from vllm_kvpca.calibration.key_bias import as_tensors
from vllm_kvpca.codec import balanced_basis, encoder, mix_bands, pca_basis
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
    """Which of "k", "v" and "q", the queries, the format needs second moments of."""
    which = [which for which in "kv" if getattr(config, which).calibrated]
    balanced = config.k.basis == "balanced"
    queries = balanced or CALIBRATED_FORMATS[config.format].query_weighted
    return [*which, "q"] if queries else which


def preset_config(
    name: str,
    model: str,
    revision: str | None,
    shape: AttentionShape,
    without_bias: bool = False,
) -> PresetConfig:
    """Configuration of a preset of format `name`, before any text is read.

    Args:
        without_bias: whether a K with a fitted basis is stored without the model's bias, and then
            in a balanced basis.

    Raises:
        CalibrationError: the format's bands do not fit the model's heads.
    """
    description, k, v, *_ = CALIBRATED_FORMATS[name]
    try:
        for tensor in (k, v):
            tensor.resolve(shape.head_dim)
    except LayoutError as error:
        raise CalibrationError(
            f"format {name!r} does not fit heads of {shape.head_dim} dimensions: {error}"
        ) from error
    if without_bias and k.calibrated:
        # What is left of the bias, in pairs that turn fast, is large where no query looks: a
        # balanced basis squeezes it.
        k = k.model_copy(update={"without_bias": True, "basis": "balanced"})
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


def fit_bases(moments: Moments, config: PresetConfig) -> dict[str, torch.Tensor]:
    """Bases from second moments.

    Args:
        moments: of what `wanted(config)` names.

    Returns:
        "k", "v" to (layers, kv_heads, head_dim, head_dim) float32, for those with a basis; and
        what is taken out of K, if anything is (key_bias.as_tensors).

    Raises:
        CalibrationError: the model computed NaN or infinity.
    """
    recipe = CALIBRATED_FORMATS[config.format]
    means = {which: moments.mean(which) for which in moments.sums}
    for which, mean in means.items():
        if not torch.isfinite(mean).all():
            raise CalibrationError(
                f"the model computes NaN or infinity in {which.upper()}: try --dtype float32, and "
                "check that the model's weights are whole."
            )
    bases = {}
    for which in sorted(means.keys() - {"q"}):
        if getattr(config, which).basis == "balanced":
            fitted = balanced_basis(means[which], means["q"])
        elif which == "k" and recipe.query_weighted:
            fitted = pca_basis(_shape(means["k"]) + _shape(means["q"]))
        else:
            fitted = pca_basis(means[which])
        widths = [band.width for band in getattr(config, which).resolve(fitted.shape[-1])]
        bases[which] = mix_bands(fitted, widths) if recipe.mixed else fitted
    return bases | (as_tensors(moments.key_biases) if config.k.without_bias else {})


def _shape(moment: torch.Tensor) -> torch.Tensor:
    """A second moment without its size: trace 1.

    The sum of K's and the queries' is what K's basis diagonalizes: directions in which both are
    strong come first, those in which neither is last.
    """
    return moment / moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def band_energy(
    moments: Moments, bases: dict[str, torch.Tensor], config: PresetConfig
) -> dict[str, list[float]]:
    """Share of the components' energy that falls into each band, averaged over layers and heads."""
    shares: dict[str, list[float]] = {}
    for which in "kv":
        if which not in bases:
            continue
        basis = bases[which]
        columns = encoder(basis).double()
        energy = (columns * (moments.mean(which) @ columns)).sum(-2)
        energy = (energy / energy.sum(-1, keepdim=True)).mean((0, 1))
        widths = [band.width for band in getattr(config, which).resolve(basis.shape[-1])]
        shares[which] = [float(part.sum()) for part in energy.split(widths)]
    return shares
