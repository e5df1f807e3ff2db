"""Presets: a folder that says what to store, with which basis, and how it was measured."""

from vllm_kvpca.preset.files import Preset, load_preset, save_preset
from vllm_kvpca.preset.find import list_shipped, preset_folder
from vllm_kvpca.preset.formats import FORMATS
from vllm_kvpca.preset.schema import BandSpec, ModelShape, PresetConfig, TensorFormat

__all__ = [
    "FORMATS",
    "BandSpec",
    "ModelShape",
    "Preset",
    "PresetConfig",
    "TensorFormat",
    "list_shipped",
    "load_preset",
    "preset_folder",
    "save_preset",
]
