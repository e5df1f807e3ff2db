"""The options of one engine, and the vLLM settings they cannot be combined with.

Options travel in `VllmConfig.additional_config["kv_compression"]`: it reaches every process
and is part of vLLM's compile-cache key.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.pages.boundary import DEFAULT_COMPRESS_AFTER, DEFAULT_KEEP_RECENT, Policy
from vllm_kvpca.preset import Preset, load_preset
from vllm_kvpca.preset.choose import choose_preset
from vllm_kvpca.preset.files import list_shipped
from vllm_kvpca.preset.formats import AUTO
from vllm_kvpca.preset.identity import Served
from vllm_kvpca.serving.log import logger

KEY = "kv_compression"


def asks_for_compression(config: Any) -> bool:
    """Whether a VllmConfig, or EngineArgs, asks for KV compression. Raises nothing, whatever
    `config` is: servers that do not compress ask too."""
    additional = getattr(config, "additional_config", None)
    return isinstance(additional, dict) and additional.get(KEY) is not None


class CompressionOptions(BaseModel):
    """What the user asked for.

    Attributes:
        preset: a preset folder, a Hub repository, a shipped name or "auto".
        compress_after, keep_recent: tokens; see pages.boundary.
        allow_other_weights: whether a preset may have been calibrated on other weights of the
            same shape; see preset.identity.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preset: str
    compress_after: int = DEFAULT_COMPRESS_AFTER
    keep_recent: int = DEFAULT_KEEP_RECENT
    allow_other_weights: bool = False

    @field_validator("compress_after", "keep_recent", mode="before")
    @classmethod
    def _default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @classmethod
    def parse(cls, values: Any) -> CompressionOptions:
        """Options from a dictionary.

        Raises:
            OptionsError: unknown keys, wrong types, or thresholds that make no sense.
        """
        if not isinstance(values, dict):
            raise OptionsError(f'additional_config["{KEY}"] must be a dictionary, got {values!r}.')
        if not values.get("preset"):
            raise OptionsError(
                "KV compression needs a preset: add --kv-compression-preset NAME_OR_PATH "
                f'(or "preset" in additional_config["{KEY}"]). '
                f"Shipped: {', '.join(list_shipped())}; or auto."
            )
        try:
            options = cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise OptionsError(
                f'additional_config["{KEY}"]: {where}: {first["msg"]}. '
                f"Known options: {', '.join(cls.model_fields)}."
            ) from error
        Policy(options.compress_after, options.keep_recent)
        return options

    def resolved(self, model: Served, model_config: Any = None) -> CompressionOptions:
        """These options with the preset that "auto" stands for.

        Args:
            model: where it is and what it is called.
            model_config: the model's configuration (of transformers), None if not known.
        """
        if self.preset != AUTO:
            return self
        facts = (model_shape(model_config), has_key_bias(model_config)) if model_config else ()
        preset, why = choose_preset(model, *facts)
        logger.info("KV compression preset auto is %s: %s", preset, why)
        return self.model_copy(update={"preset": preset})

    @classmethod
    def of(cls, vllm_config: Any) -> CompressionOptions | None:
        """Options of an engine, None if compression is off."""
        values = (vllm_config.additional_config or {}).get(KEY)
        return None if values is None else cls.parse(values)


@lru_cache(maxsize=4)
def cached_preset(name: str) -> Preset:
    """A preset, loaded once per process: every attention layer asks for it."""
    return load_preset(name)


def served_model(vllm_config: Any) -> Served:
    """Where the model is and what it is called. What clients call it says nothing of it."""
    model = vllm_config.model_config
    own = getattr(model.hf_config, "_name_or_path", "")
    return Served(
        model.model,
        model.revision,
        vllm_config.load_config.download_dir,
        (own,) if own else (),
    )


def has_key_bias(config: Any) -> bool:
    """Whether the model adds a bias to K, as far as its text configuration says."""
    qwen2 = str(getattr(config, "model_type", "")).startswith("qwen2")  # not a field: always there
    return qwen2 or any(getattr(config, name, False) for name in ("attention_bias", "qkv_bias"))


def model_shape(config: Any) -> tuple[int, int, int] | None:
    """Layers, KV heads and head_dim of a text configuration; None if it does not name them."""
    heads = getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    hidden = getattr(config, "hidden_size", None)
    if not (heads and layers and hidden):
        return None
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    return layers, getattr(config, "num_key_value_heads", None) or heads, head_dim


def full_attention_layers(model_config: Any) -> list[int]:
    """Indices of the full-attention layers, as far as the model's config tells them apart."""
    kinds = getattr(model_config.hf_text_config, "layer_types", None)
    if kinds is None:
        return list(range(model_config.get_total_num_hidden_layers()))
    return [index for index, kind in enumerate(kinds) if kind == "full_attention"]
