"""What the preset "auto" stands for."""

from __future__ import annotations

from vllm_kvpca.preset.files import load_config
from vllm_kvpca.preset.find import list_shipped
from vllm_kvpca.preset.formats import DEFAULT, DEFAULT_WITH_KEY_BIAS, RECOMMENDED
from vllm_kvpca.preset.identity import Served, fits
from vllm_kvpca.preset.names import same_family
from vllm_kvpca.preset.schema import PresetConfig
from vllm_kvpca.preset.weights import load_samples


def choose_preset(
    model: Served, shape: tuple[int, int, int] | None = None, key_bias: bool = False
) -> tuple[str, str]:
    """What the preset "auto" stands for.

    Args:
        model: where it is and what it is called.
        shape: layers, KV heads and head_dim of the model, None if not known.
        key_bias: whether its K has a bias.

    Returns:
        The preset of the recommended format shipped for the model, else the one shipped for its
        architecture, else a calibration-free default; and a sentence that says why.
    """
    shipped = list_shipped()
    for name, folder in shipped.items():
        if folder and folder.name == RECOMMENDED:
            config = load_config(name, folder)
            if shape in (None, _shape(config)) and fits(config, load_samples(folder), model):
                return name, "it is shipped for this model."
    for name, folder in shipped.items():
        if folder and same_family(name.partition("/")[0], model.name):
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
