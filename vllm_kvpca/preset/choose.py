"""What the preset "auto" stands for."""

from __future__ import annotations

from collections.abc import Sequence

from vllm_kvpca.preset.files import load_config
from vllm_kvpca.preset.find import list_shipped
from vllm_kvpca.preset.formats import DEFAULT, DEFAULT_WITH_KEY_BIAS, RECOMMENDED
from vllm_kvpca.preset.names import same_family, same_model
from vllm_kvpca.preset.schema import PresetConfig


def choose_preset(
    names: Sequence[str], shape: tuple[int, int, int] | None = None, key_bias: bool = False
) -> tuple[str, str]:
    """What the preset "auto" stands for.

    Args:
        names: under which the model is known: path, served names.
        shape: layers, KV heads and head_dim of the model, None if not known.
        key_bias: whether its K has a bias.

    Returns:
        The preset of the recommended format shipped for the model, else the one shipped for its
        architecture, else a calibration-free default; and a sentence that says why.
    """
    shipped = list_shipped()
    for name in shipped:
        owner, _, format_name = name.partition("/")
        if format_name == RECOMMENDED and any(same_model(owner, served) for served in names):
            return name, "it is shipped for this model."
    for name, folder in shipped.items():
        if folder and any(same_family(name.partition("/")[0], served) for served in names):
            config = load_config(name, folder)
            if not config.calibrated and shape in (None, _shape(config)):
                return name, (
                    "it is shipped for this architecture, not measured on it. " + config.description
                )
    why = f"no {RECOMMENDED} preset is shipped for this model, and it needs no calibration."
    if key_bias:
        return DEFAULT_WITH_KEY_BIAS, f"{why} K is rotated, because this model's K has a bias."
    return DEFAULT, why


def _shape(config: PresetConfig) -> tuple[int, int, int] | None:
    model = config.model
    return (model.num_layers, model.num_kv_heads, model.head_dim) if model else None
