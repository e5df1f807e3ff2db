"""What cannot be served compressed, refused before any process or memory is taken."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.codec.bands import RAW_BITS
from vllm_kvpca.errors import OptionsError, UnsupportedError
from vllm_kvpca.pages.block_sizes import BLOCK_STEP, SMALLEST_RAW_BLOCK
from vllm_kvpca.preset import Preset
from vllm_kvpca.preset.formats import DEFAULT_WITH_KEY_BIAS
from vllm_kvpca.serving.log import logger
from vllm_kvpca.serving.settings.options import (
    CompressionOptions,
    full_attention_layers,
    has_key_bias,
    served_model,
)


def check_engine(vllm_config: Any, preset: Preset) -> None:
    """Refuse what cannot be served compressed, before any process or memory is taken.

    Raises:
        UnsupportedError: naming each option that is in the way.
        OptionsError: a block size that does not work.
        PresetMismatch: the preset belongs to another model.
    """
    _check_checkpoint(vllm_config.model_config, vllm_config.cache_config)
    _check_block_size(vllm_config.cache_config)
    problems = [text for wrong, text in _unsupported(vllm_config) if wrong]
    if problems:
        raise UnsupportedError(
            "KV compression cannot be combined with: " + "; ".join(problems) + ". "
            "Drop those options, or serve without --kv-compression-preset."
        )
    model = vllm_config.model_config
    preset.check_shape(
        model.get_total_num_hidden_layers(),
        model.get_total_num_kv_heads(),
        model.get_head_size(),
        full_attention_layers(model),
    )
    preset.layout(model.get_head_size())
    check_weights(vllm_config, preset, later=True)
    k = preset.config.k
    if k.basis == "identity" and k.bands[0].bits < RAW_BITS and has_key_bias(model.hf_text_config):
        logger.warning(
            "This model's K has a bias. If it is large, one scale per token is too coarse for K in "
            "preset %s: %s rotates K, or calibrate a preset.",
            preset.name,
            DEFAULT_WITH_KEY_BIAS,
        )


def check_weights(vllm_config: Any, preset: Preset, later: bool = False) -> None:
    """Refuse, or warn of, weights that are not those the preset was calibrated on.

    Args:
        later: whether it is asked again once the model's files have been downloaded.

    Raises:
        PresetMismatch: see preset.identity.
    """
    options = CompressionOptions.of(vllm_config)
    allowed = options is not None and options.allow_other_weights
    if warning := preset.check_weights(served_model(vllm_config), allowed, later):
        logger.warning("%s", warning)


def _unsupported(config: Any) -> list[tuple[bool, str]]:
    """(whether it is set, what to tell the user) for everything that is not supported yet."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    events = config.kv_events_config
    return [
        (
            config.kv_transfer_config is not None,
            "KV transfer and offloading (--kv-transfer-config)",
        ),
        (cache.kv_offloading_size is not None, "KV offloading (--kv-offloading-size)"),
        (config.speculative_config is not None, "speculative decoding (--speculative-config)"),
        (parallel.decode_context_parallel_size > 1, "--decode-context-parallel-size above 1"),
        (parallel.prefill_context_parallel_size > 1, "--prefill-context-parallel-size above 1"),
        (parallel.pipeline_parallel_size > 1, "--pipeline-parallel-size above 1"),
        (parallel.use_ubatching, "micro-batching (--enable-dbo)"),
        (
            # vLLM 0.32 takes a raw cache of another 16-bit type than the model's; kernels do not.
            cache.cache_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
            f"--kv-cache-dtype {cache.cache_dtype} (a preset defines the stored format; use auto)",
        ),
        (cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill"),
        (events is not None and events.enable_kv_cache_events, "KV cache events"),
        (
            bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
            "--disable-hybrid-kv-cache-manager",
        ),
        (model.runner_type != "generate", f"--runner {model.runner_type}"),
        (model.is_encoder_decoder, "encoder-decoder models"),
        (model.use_mla, "MLA models"),
        (model.is_mm_prefix_lm, "models with bidirectional attention over images"),
        (model.rswa_window is not None, "models with reference sliding windows"),
        (
            str(model.dtype) not in ("torch.bfloat16", "torch.float16"),
            f"--dtype {str(model.dtype).removeprefix('torch.')} (use bfloat16 or float16)",
        ),
    ]


def _check_checkpoint(model_config: Any, cache_config: Any) -> None:
    """A checkpoint may ask for a quantized KV cache on its own, unless a dtype is given.

    Raises:
        UnsupportedError: naming the checkpoint's setting.
    """
    dtype = str(model_config.dtype).removeprefix("torch.")
    setting = _kv_quantization(model_config.hf_config)
    if setting is None or cache_config.cache_dtype == dtype:
        return
    raise UnsupportedError(
        f"the quantization config of this checkpoint ({setting}) asks for a quantized KV cache, "
        "but a compression preset defines the stored format itself: add "
        f"--kv-cache-dtype {dtype}, or serve without --kv-compression-preset."
    )


def _kv_quantization(hf_config: Any) -> str | None:
    """The setting of a checkpoint's quantization config that quantizes the KV cache."""
    quantization = getattr(hf_config, "quantization_config", None)
    if not isinstance(quantization, dict):
        return None
    for values in (quantization, quantization.get("quantization")):
        for key in ("kv_cache_scheme", "kv_cache_quant_algo"):
            if isinstance(values, dict) and values.get(key):
                return key
    return None


def _check_block_size(cache_config: Any) -> None:
    """Raises:
    OptionsError: naming the sizes that work.
    """
    size = cache_config.block_size
    if not cache_config.user_specified_block_size:
        return
    if size < SMALLEST_RAW_BLOCK or size % BLOCK_STEP:
        raise OptionsError(
            f"--block-size {size}: with KV compression it is the number of raw tokens in a block "
            f"and must be a multiple of {BLOCK_STEP} from {SMALLEST_RAW_BLOCK} on. Without the "
            "option a size that fits the preset is chosen."
        )
