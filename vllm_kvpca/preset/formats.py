"""The named formats. A format is a list of bands for K and one for V, nothing else."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

from vllm_kvpca.preset.schema import BandSpec, PresetConfig, TensorFormat


def _tensor(basis: Any, *bands: tuple[str, Any]) -> TensorFormat:
    specs = tuple(BandSpec(share=Fraction(share), bits=bits) for share, bits in bands)
    return TensorFormat(basis=basis, bands=specs)


_RAW = _tensor("identity", ("1", 16))

FORMATS: dict[str, PresetConfig] = {
    config.format: config
    for config in (
        PresetConfig(
            format="raw",
            description="K and V as they are: no compression, to test the machinery.",
            k=_RAW,
            v=_RAW,
        ),
        PresetConfig(
            format="k8v8",
            description="K and V in int8 with one scale per token: nearly lossless.",
            k=_tensor("identity", ("1", 8)),
            v=_tensor("identity", ("1", 8)),
        ),
        PresetConfig(
            format="k8v4",
            description="K in int8, V in int4 after a Hadamard rotation.",
            k=_tensor("identity", ("1", 8)),
            v=_tensor("hadamard", ("1", 4)),
        ),
        PresetConfig(
            format="kh8v4",
            description="K in int8 and V in int4, both after a Hadamard rotation: for models "
            "whose K has a large bias.",
            k=_tensor("hadamard", ("1", 8)),
            v=_tensor("hadamard", ("1", 4)),
        ),
        PresetConfig(
            format="v-hadamard-mixed",
            description="K raw, V after a Hadamard rotation: 3/8 in int8, the rest in int4.",
            k=_RAW,
            v=_tensor("hadamard", ("3/8", 8), ("5/8", 4)),
        ),
    )
}
"""Calibration-free formats by name: they fit any standard-attention model."""


class CalibratedFormat(NamedTuple):
    """A format whose bases `vllm-kvpca calibrate` fits.

    Attributes:
        mixed: whether the components of each band are rotated among themselves (codec.mix_bands).
        query_weighted: whether K's basis is fitted to K and the queries instead of K alone: an
            error of K counts only in the directions in which queries look.
    """

    description: str
    k: TensorFormat
    v: TensorFormat
    mixed: bool = False
    query_weighted: bool = False


_HADAMARD_4 = _tensor("hadamard", ("1", 4))
_EIGHT_FOUR = _tensor("pca", ("3/8", 8), ("5/8", 4))

CALIBRATED_FORMATS: dict[str, CalibratedFormat] = {
    "v-mixed": CalibratedFormat(
        "K raw, V in its PCA basis: the strongest 3/8 of the components in int8, the rest in int4.",
        _RAW,
        _EIGHT_FOUR,
        mixed=True,
    ),
    "k5v4": CalibratedFormat(
        "K in a basis weighted by the queries: 1/4 of the components in int8, the rest in int4. "
        "V in int4 after a Hadamard rotation.",
        _tensor("pca", ("1/4", 8), ("3/4", 4)),
        _HADAMARD_4,
        mixed=True,
        query_weighted=True,
    ),
    "k5.5v5.5": CalibratedFormat(
        "K in a basis weighted by the queries, V in its PCA basis: of each the strongest 3/8 of "
        "the components in int8, the rest in int4.",
        _EIGHT_FOUR,
        _EIGHT_FOUR,
        mixed=True,
        query_weighted=True,
    ),
    "k5.5v4": CalibratedFormat(
        "K in a basis weighted by the queries: 3/8 of the components in int8, the rest in int4. "
        "V in int4 after a Hadamard rotation.",
        _EIGHT_FOUR,
        _HADAMARD_4,
        mixed=True,
        query_weighted=True,
    ),
    "k4v4": CalibratedFormat(
        "K in int4 in a basis balanced between keys and queries, which is not orthonormal. "
        "V in int4 after a Hadamard rotation.",
        _tensor("balanced", ("1", 4)),
        _HADAMARD_4,
        mixed=True,
    ),
    "v-rank-int8": CalibratedFormat(
        "K raw, V cut to 3/4 of its PCA components in int8. Kept for comparison: dropping "
        "components loses far more quality than the same bytes in mixed bit widths.",
        _RAW,
        _tensor("pca", ("3/4", 8), ("1/4", 0)),
    ),
}
"""Formats that `vllm-kvpca calibrate` turns into presets, by name."""

AUTO = "auto"
"""In place of a preset's name; see choose.choose_preset."""
RECOMMENDED = "k5.5v5.5"
DEFAULT = "k8v4"
DEFAULT_WITH_KEY_BIAS = "kh8v4"
"""A bias of K in a few channels makes one scale per token too coarse for all others. Rotated, it is
spread over all components (benchmarks/key_bias.py)."""
