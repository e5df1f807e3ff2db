"""Calibrated formats without a calibration: presets to measure speed and capacity with, which do
not depend on what is in a basis."""

from __future__ import annotations

import torch

from vllm_kvpca.calibration.collect import AttentionShape
from vllm_kvpca.calibration.fit import preset_config
from vllm_kvpca.preset import Preset

CARD = "# {name}\n\nBases are random: for measuring speed and capacity, of no use to a model.\n"


def random_preset(format: str, model: str, shape: AttentionShape, seed: int = 0) -> Preset:
    """A preset of a calibrated format with random orthonormal bases.

    Args:
        format: one of CALIBRATED_FORMATS.
        model: name of the model it is for.
        shape: the model's layers and heads.

    Raises:
        CalibrationError: the format's bands do not fit the heads.
    """
    config = preset_config(format, model, None, shape)
    generator = torch.Generator().manual_seed(seed)
    size = (len(shape.layers), shape.num_kv_heads, shape.head_dim, shape.head_dim)
    bases = {
        which: torch.linalg.qr(torch.randn(size, generator=generator)).Q
        for which in "kv"
        if getattr(config, which).calibrated
    }
    return Preset(format, config, bases)
