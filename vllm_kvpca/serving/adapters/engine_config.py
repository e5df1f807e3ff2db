"""Route full-attention layers to our backend, and refuse what cannot be compressed."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.preset.formats import AUTO
from vllm_kvpca.preset.identity import Served
from vllm_kvpca.serving.adapters.changes import Patch, Wrap
from vllm_kvpca.serving.adapters.hooks import BACKEND_PATH
from vllm_kvpca.serving.log import logger
from vllm_kvpca.serving.platform import device_kind
from vllm_kvpca.serving.settings.options import (
    KEY,
    CompressionOptions,
    asks_for_compression,
    cached_preset,
)
from vllm_kvpca.serving.settings.refusals import check_engine

BACKEND_KIND = "full_attention"


def _create_engine_config(original: Any) -> Any:
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not asks_for_compression(self):
            return original(self, *args, **kwargs)
        preset = _prepare(self)
        config = original(self, *args, **kwargs)
        check_engine(config, preset)
        return config

    return wrapper


def _prepare(engine_args: Any) -> Any:
    """Resolve the options of an engine that compresses, select our backend, return the preset."""
    args = engine_args
    options = CompressionOptions.parse(args.additional_config[KEY])
    device_kind()  # refuses other platforms
    if options.preset == AUTO:
        model = Served(args.model, args.revision, args.download_dir)
        options = options.resolved(model, _text_config(args))
    cached_preset.cache_clear()  # a folder may hold another preset than for an earlier engine
    preset = cached_preset(options.preset)
    args.additional_config = {**args.additional_config, KEY: options.model_dump()}
    _use_our_backend(args.attention_config)
    return preset


def _text_config(engine_args: Any) -> Any:
    """The model's configuration, before vLLM reads it; None, with a warning, where it cannot be
    read: the preset is then chosen by the model's name alone."""
    from vllm.transformers_utils.config import get_config

    args = engine_args
    try:
        config = get_config(
            args.hf_config_path or args.model,
            args.trust_remote_code,
            args.revision,
            args.code_revision,
            args.config_format,
        )
        return config.get_text_config()
    except Exception as error:
        logger.warning(
            "KV compression preset auto: the configuration of %s cannot be read (%s: %s), so the "
            "preset is chosen by the model's name alone, whatever its shape and whether or not its "
            "K has a bias. Name a preset to be sure.",
            args.model,
            type(error).__name__,
            error,
        )
        return None


def _use_our_backend(attention_config: Any) -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    path = AttentionBackendEnum.CUSTOM.get_path()
    if path != BACKEND_PATH:
        raise UnsupportedError(
            f"another plugin uses vLLM's one custom attention backend ({path}): keep it out with "
            "VLLM_PLUGINS=kvpca, or serve without --kv-compression-preset."
        )
    kinds = {**attention_config.backend_per_kind, BACKEND_KIND: AttentionBackendEnum.CUSTOM}
    attention_config.backend_per_kind = kinds


PATCH = Patch(
    title="backend choice and refusals",
    why="A general plugin sees no engine's configuration while it is made.",
    how="`create_engine_config` of an engine that asks for compression resolves the options, "
    "selects our backend for full-attention layers, and refuses what cannot be combined with it.",
    waits_for="a configuration hook for general plugins",
    fails="A refusal before any process or memory is taken.",
    changes=(
        Wrap(
            "vllm.engine.arg_utils:EngineArgs.create_engine_config",
            _create_engine_config,
            ("self",),
        ),
    ),
)
