"""How an attention layer gets its second cache owner, its plan and its codec."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import Any

import torch
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform

from vllm_kvpca.errors import PresetMismatch, UnsupportedError
from vllm_kvpca.ops.layer_codec import LayerCodec, codec_of
from vllm_kvpca.pages.block_sizes import RAW_BLOCKS, BlockSizes, choose_blocks
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.pages.layout import raw_token_bytes
from vllm_kvpca.preset import FORMATS, Preset
from vllm_kvpca.preset.identity import Served
from vllm_kvpca.preset.weights import NotComparable, of_checkpoint
from vllm_kvpca.serving.cache.pairs import ARCHIVE_SUFFIX
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.log import logger
from vllm_kvpca.serving.observe.times import timer_of
from vllm_kvpca.serving.platform import device_kind
from vllm_kvpca.serving.settings.options import (
    CompressionOptions,
    cached_preset,
    full_attention_layers,
    served_model,
)
from vllm_kvpca.serving.settings.refusals import check_weights
from vllm_kvpca.serving.step.archive_layer import ArchiveLayer, CompressedImpl

_NOT_THE_MODEL = ("transformers_version", "torch_dtype", "dtype")
"""Keys of a configuration that are no part of the model; the dtype has its own place in a plan."""


def attach_archive(impl: CompressedImpl, vllm_config: Any) -> ArchiveLayer:
    """Give a layer its two cache specs and register its archive with vLLM.

    Raises:
        UnsupportedError: a layer that only looks like plain full attention.
    """
    context = vllm_config.compilation_config.static_forward_context
    name, layer = next((n, x) for n, x in context.items() if getattr(x, "impl", None) is impl)
    if type(layer) is not Attention or layer.head_size_v != layer.head_size:
        raise UnsupportedError(
            f"layer {name} ({type(layer).__name__}) is no plain full attention and cannot be "
            "compressed: serve this model without --kv-compression-preset."
        )
    options = CompressionOptions.of(vllm_config)
    assert options is not None
    preset = cached_preset(options.preset)
    if not any(is_compressed(x) and x.impl.archive is not None for x in context.values()):
        check_weights(vllm_config, preset)  # the model's files are surely on this machine by now
    codec = _layer_codec(preset, name, layer, vllm_config)
    specs = cache(lambda: make_specs(vllm_config, options, preset, layer))
    # On this instance only: other Attention layers of the model keep their own spec.
    layer.get_kv_cache_spec = lambda vllm_config: specs()[0]
    shape = (layer.num_heads, layer.num_kv_heads, layer.head_size)
    archive = ArchiveLayer(lambda: specs()[1], codec, shape, timer_of(context))
    # Below the layer, so that what looks after the model's buffers finds the bases.
    layer.add_module("kvpca_archive", archive)
    if device_kind() == "cuda":
        from vllm_kvpca.serving.step.flash import causal_attention, flash_version
        from vllm_kvpca.serving.step.workspace import workspace_for

        flash_version(layer.head_size, impl.softmax.soft_cap is not None)
        key_bias = codec.k_bias is not None
        archive.workspace = workspace_for(
            context, impl, codec.dtype, torch.device("cuda"), causal_attention, key_bias
        )
    context[name + ARCHIVE_SUFFIX] = archive
    # vLLM splits kinds of layers into groups in this order: archives as their layers.
    for layer_name in [name for name in context if name + ARCHIVE_SUFFIX in context]:
        context[layer_name + ARCHIVE_SUFFIX] = context.pop(layer_name + ARCHIVE_SUFFIX)
    return archive


def make_specs(
    vllm_config: Any, options: CompressionOptions, preset: Preset, layer: Any
) -> tuple[RecentSpec, ArchiveSpec]:
    """Both cache specs of a layer: not before vLLM asks for them, because its own block size, by
    which ours are chosen, is final only once all layers are loaded."""
    plan = layer_plan(vllm_config, options, preset, layer)
    common = {
        "num_kv_heads": layer.num_kv_heads,
        "head_size": layer.head_size,
        # Equal dtypes: vLLM zeroes the blocks of groups whose dtypes differ.
        "dtype": plan.dtype,
        "planned": plan,
    }
    batches = vllm_config.max_concurrent_batches
    recent = RecentSpec(block_size=plan.raw_block, batches=batches, **common)
    return recent, ArchiveSpec(block_size=plan.archive_block, **common)


def layer_plan(
    vllm_config: Any, options: CompressionOptions, preset: Preset, layer: Any
) -> LayerPlan:
    """The plan of a layer, before vLLM equalizes pages with layers of other kinds."""
    blocks = block_sizes(vllm_config, options, preset, layer)
    return LayerPlan(
        streams=preset.streams(layer.head_size),
        dtype=layer.kv_cache_torch_dtype,
        raw_block=blocks.raw_block,
        archive_block=blocks.archive_block,
        compress_after=options.compress_after,
        keep_recent=options.keep_recent,
        kv_heads=layer.num_kv_heads,
        model=model_digest(vllm_config),
    )


def model_digest(vllm_config: Any) -> str:
    """Of the model's configuration and, where its files can be read, samples of its weights."""
    model = vllm_config.model_config
    width = model.get_total_num_kv_heads() * model.get_head_size()
    layers = tuple(full_attention_layers(model))
    weights = _weights_digest(served_model(vllm_config), layers, width)
    return config_digest(model.hf_text_config) + weights


@cache
def _weights_digest(model: Served, layers: tuple[int, ...], width: int) -> str:
    """Once for all layers: even to look for the files takes a while in the Hub's cache."""
    folder = model.folder
    try:
        return of_checkpoint(folder, layers, width).digest if folder and layers else ""
    except NotComparable:
        return ""


def config_digest(config: Any) -> str:
    """Of a model's configuration, wherever and by whichever transformers it was read."""
    values = {
        key: value
        for key, value in config.to_dict().items()
        if not key.startswith("_") and key not in _NOT_THE_MODEL
    }
    text = json.dumps(values, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _layer_codec(preset: Preset, name: str, layer: Any, vllm_config: Any) -> LayerCodec:
    """The bases, which are on the device before vLLM measures what memory is left; the layout
    follows with the final plan."""
    heads = _heads(preset, name, layer, vllm_config)
    index = extract_layer_index(name)
    device = torch.device(current_platform.device_type)
    layout, dtype = preset.layout(layer.head_size), layer.kv_cache_torch_dtype
    codec = codec_of(preset, index, heads, layout, dtype, device)
    if device_kind() == "cuda":
        return codec.with_tables(vllm_config.model_config.max_model_len)
    return codec


def _heads(preset: Preset, name: str, layer: Any, vllm_config: Any) -> list[int]:
    """Global indices of the layer's KV heads on this rank.

    Raises:
        PresetMismatch: fitted bases for a layer whose heads are not the model's own.
    """
    model = vllm_config.model_config
    heads = local_kv_heads(
        model.get_total_num_kv_heads(),
        get_tensor_model_parallel_rank(),
        get_tensor_model_parallel_world_size(),
    )
    alike = len(heads) == layer.num_kv_heads and layer.head_size == model.get_head_size()
    if alike or not preset.config.calibrated:
        return heads if alike else list(range(layer.num_kv_heads))
    raise PresetMismatch(
        f"layer {name} has {layer.num_kv_heads} KV heads of {layer.head_size} on this rank, others "
        f"of the model have {len(heads)} of {model.get_head_size()}: preset {preset.name!r} has "
        f"bases of one shape only. Use a calibration-free format ({', '.join(FORMATS)})."
    )


def local_kv_heads(total: int, rank: int, world: int) -> list[int]:
    """Global indices of the KV heads that vLLM puts on one tensor-parallel rank."""
    if total >= world:
        return list(range(rank * total // world, (rank + 1) * total // world))
    return [rank // (world // total)]


def block_sizes(
    vllm_config: Any, options: CompressionOptions, preset: Preset, layer: Any
) -> BlockSizes:
    """Block sizes of both groups, before vLLM equalizes pages.

    A block size that the user asks for is the raw block's. Beside other kinds of layers it is a
    multiple of theirs, so that vLLM can equalize the pages by giving them larger blocks, of which
    a chunk of local attention has to be a multiple; of compressed layers of several shapes, the one
    with the largest pages decides for all.
    """
    chosen = vllm_config.cache_config
    layers = vllm_config.compilation_config.static_forward_context.values()
    chunks = [x.attention_chunk_size for x in layers if isinstance(x, ChunkedLocalAttention)]
    raw_blocks: tuple[int, ...] = RAW_BLOCKS
    if chosen.user_specified_block_size:
        raw_blocks = (chosen.block_size,)
    elif any(_left_to_vllm(other) for other in layers):
        multiples = [size for size in RAW_BLOCKS if size % chosen.block_size == 0]
        fitting = [size for size in multiples if not any(chunk % size for chunk in chunks)]
        raw_blocks = tuple(fitting) or (chosen.block_size,)

    def choose(head_size: int, raw_blocks: tuple[int, ...]) -> BlockSizes:
        return choose_blocks(
            raw_token_bytes(head_size),
            preset.layout(head_size).content_bytes,
            compress_after=options.compress_after,
            keep_recent=options.keep_recent,
            raw_blocks=raw_blocks,
        )

    ours = [layer, *(other for other in layers if is_compressed(other))]
    sizes = {other.num_kv_heads * other.head_size: other.head_size for other in ours}
    own, largest = layer.num_kv_heads * layer.head_size, max(sizes)
    if any(largest % size for size in sizes):
        _warn_of_padding(tuple(sorted(sizes)))
    blocks = choose(sizes[largest], raw_blocks)
    return blocks if own == largest else choose(layer.head_size, (blocks.raw_block,))


@cache
def _warn_of_padding(sizes: tuple[int, ...]) -> None:
    logger.warning(
        "Compressed layers of this model have %s values of K per token, which do not divide each "
        "other: vLLM pads the pages of the smaller layers, and less memory is saved.",
        " and ".join(map(str, sizes)),
    )


def is_compressed(layer: Any) -> bool:
    """Whether an attention layer is one of ours."""
    return isinstance(getattr(layer, "impl", None), CompressedImpl)


def _left_to_vllm(layer: Any) -> bool:
    if not isinstance(layer, AttentionLayerBase) or isinstance(layer, ArchiveLayer):
        return False
    return not is_compressed(layer)
