"""A transformers cache that stores what a preset says.

    cache = load_preset_cache("k8v4", num_layers=model.config.num_hidden_layers)
    model.generate(**inputs, past_key_values=cache, max_new_tokens=100)

It saves memory, not time: attention is transformers' own and needs K and V in the model's dtype,
so each layer restores its archive in each forward pass. One layer's expansion at a time is the
peak beside the archive.

Forward passes may run with or without `torch.no_grad()`; stored tokens are constants to
automatic differentiation (see hf_cache.layer).
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any, TypedDict

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from vllm_kvpca.errors import OptionsError, PresetMismatch, UnsupportedError
from vllm_kvpca.hf_cache.layer import CompressedLayer
from vllm_kvpca.ops.layer_codec import LayerCodec, codec_of
from vllm_kvpca.pages.boundary import DEFAULT_COMPRESS_AFTER, DEFAULT_KEEP_RECENT, Policy
from vllm_kvpca.preset import Preset, load_preset
from vllm_kvpca.preset.identity import Served

_logger = logging.getLogger("vllm.kvpca")

ALIGN = 32
"""Tokens by which the boundary moves. Appending copies a layer's archive, so not every token."""


class MemoryStats(TypedDict):
    """What the compressed layers of a cache hold; tokens are per sequence, padding included."""

    compressed_layers: int
    other_layers: int
    """Layers left to transformers (sliding windows, ...); no other figure counts them."""
    tokens: int
    archived_tokens: int
    raw_tokens: int
    archived_bytes: int
    """Codes and scales of K and V."""
    raw_bytes: int
    """K and V of the recent tokens."""
    uncompressed_bytes: int
    """K and V of all tokens in the model's dtype: what DynamicCache would hold."""
    basis_bytes: int
    """The bases, which do not grow with the tokens; not part of total_ratio."""
    total_ratio: float
    """uncompressed_bytes / (archived_bytes + raw_bytes), K and V; 1.0 for an empty cache."""


class PresetCache(Cache):
    """The layers of one model, compressed where they have full attention.

    Made by `load_preset_cache`. All of a batch has one length, so padding counts as tokens and is
    archived like them; the attention mask hides it.
    """

    def __init__(
        self,
        preset: Preset,
        policy: Policy,
        layers: list[Any],
        device: torch.device | None = None,
        config: Any = None,
    ) -> None:
        """See `load_preset_cache`.

        Args:
            layers: transformers' cache layers, None where a layer is to be compressed.
            config: the model's, if known.
        """
        self.preset = preset
        self._layers_known = config is not None
        self._device = device
        self._compressed = [i for i, layer in enumerate(layers) if layer is None]
        self._codecs: dict[tuple[Any, ...], LayerCodec] = {}
        self._num_layers = len(layers)
        super().__init__(
            layers=[
                CompressedLayer(policy, partial(self._codec, i)) if layer is None else layer
                for i, layer in enumerate(layers)
            ]
        )

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See CompressedLayer.update.

        Raises:
            PresetMismatch: the model has another number of layers than the cache, or heads of
                another shape than the preset. Nothing of this layer is stored then.
        """
        more = layer_idx >= len(self.layers)
        # A second pass begins, and the first did not reach the last layer.
        fewer = layer_idx == 0 and self.get_seq_length() and not self.layers[-1].is_initialized
        if more or (fewer and not self._layers_known):
            raise PresetMismatch(
                f"the cache was made for {len(self.layers)} layers, but the model has "
                f"{'more' if more else 'fewer'}: give load_preset_cache config=model.config."
            )
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_memory_stats(self) -> MemoryStats:
        """Bytes and tokens held now, from the tensors themselves."""
        layers = [self.layers[i] for i in self._compressed]
        used = [layer for layer in layers if layer.is_initialized]
        archived = sum(layer.k_archive.nbytes + layer.v_archive.nbytes for layer in used)
        raw = sum(layer.keys.nbytes + layer.values.nbytes for layer in used)
        stock = sum(_uncompressed_bytes(layer) for layer in used)
        bases = {
            id(basis): basis.nbytes
            for codec in self._codecs.values()
            for basis in (codec.k_basis, codec.k_encoder, codec.v_basis)
            if basis is not None
        }
        tokens = used[0].get_seq_length() if used else 0
        archived_tokens = used[0].archived if used else 0
        return MemoryStats(
            compressed_layers=len(layers),
            other_layers=len(self.layers) - len(layers),
            tokens=tokens,
            archived_tokens=archived_tokens,
            raw_tokens=tokens - archived_tokens,
            archived_bytes=archived,
            raw_bytes=raw,
            uncompressed_bytes=stock,
            basis_bytes=sum(bases.values()),
            total_ratio=stock / (archived + raw) if archived + raw else 1.0,
        )

    def _codec(
        self, layer: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> LayerCodec:
        if self._device is not None and device.type != self._device.type:
            raise OptionsError(
                f"the cache was asked for on {self._device}, but the model computes on {device}: "
                "give load_preset_cache device=model.device, or leave it out."
            )
        self.preset.check_shape(self._num_layers, kv_heads, head_dim, self._compressed)
        # Without calibration all layers share their bases.
        key = (layer if self.preset.config.calibrated else None, kv_heads, head_dim, dtype, device)
        if key not in self._codecs:
            layout, heads = self.preset.layout(head_dim), list(range(kv_heads))
            self._codecs[key] = codec_of(self.preset, layer, heads, layout, dtype, device)
        return self._codecs[key]


def load_preset_cache(
    preset_path: str | os.PathLike[str],
    num_layers: int | None = None,
    device: str | torch.device | None = None,
    *,
    adaptive: bool = True,
    compress_after: int = DEFAULT_COMPRESS_AFTER,
    keep_recent: int = DEFAULT_KEEP_RECENT,
    align: int = ALIGN,
    config: Any = None,
    allow_other_weights: bool = False,
) -> PresetCache:
    """A cache for `model.generate(..., past_key_values=cache)`. Make one for each generation.

    Args:
        preset_path: a shipped name, a folder ("./mine") or a Hub repository ("org/name",
            "org/name@revision"), as for the server.
        num_layers: layers of the model; may be left out where `config` is given.
        device: where the model computes; checked at the first token. None: anywhere. Every layer
            stores on the device of its K and V, so a model may be spread over several.
        adaptive: whether a sequence stays raw up to `compress_after` tokens and keeps its last
            `keep_recent` (up to `align` - 1 more) raw after that. False ignores all three: every
            token is archived at the end of the forward pass that computes it.
        compress_after, keep_recent: tokens; see pages.boundary.
        align: tokens by which the boundary moves while `adaptive`; the server's is the size of
            its archive blocks.
        config: the model's config (`model.config`). With it layers with sliding windows and
            the like are left to transformers, and a calibrated preset is checked against the
            model's weights. Without it every layer the preset covers counts as full attention.
        allow_other_weights: whether the preset may have been calibrated on other weights of the
            same shape; see preset.identity.

    Raises:
        PresetError: the preset is not there, damaged, or of another model or shape. Heads and
            head_dim are checked here with `config`, else at the first token.
        OptionsError: thresholds that make no sense, or no layer count.
        UnsupportedError: no layer with full attention.
    """
    policy = Policy(compress_after, keep_recent, align) if adaptive else Policy(0, 0)
    preset = load_preset(preset_path)
    if config is None:
        layers = _layers_without_config(preset, num_layers)
    else:
        layers = _layers_of(preset, config, num_layers, allow_other_weights)
    where = None if device is None else torch.device(device)
    return PresetCache(preset, policy, layers, where, config)


def _layers_without_config(preset: Preset, num_layers: int | None) -> list[Any]:
    if num_layers is None or num_layers < 1:
        raise OptionsError(
            f"num_layers is {num_layers}: give load_preset_cache "
            "num_layers=model.config.num_hidden_layers, or config=model.config."
        )
    covered = preset.config.layers if preset.config.calibrated else None
    chosen = [i for i in range(num_layers) if covered is None or i in covered]
    _check_shape(preset, num_layers, None, chosen)
    return [None if i in chosen else DynamicLayer() for i in range(num_layers)]


def _layers_of(
    preset: Preset, config: Any, num_layers: int | None, allow_other_weights: bool
) -> list[Any]:
    text = config.get_text_config(decoder=True)
    have = text.num_hidden_layers
    if num_layers not in (None, have):
        raise PresetMismatch(
            f"num_layers is {num_layers}, but the model's config says {have}: leave num_layers out."
        )
    layers = [None if type(x) is DynamicLayer else x for x in DynamicCache(config=config).layers]
    chosen = [i for i, layer in enumerate(layers) if layer is None]
    if not chosen:
        raise UnsupportedError(
            f"{text.model_type} has no layer with standard full attention, and others are not "
            "compressed: use transformers' DynamicCache."
        )
    _check_shape(preset, have, text, chosen)
    _check_weights(preset, config, allow_other_weights)
    return layers


def _check_shape(preset: Preset, num_layers: int, text: Any, layers: list[int]) -> None:
    """Refuse another shape as far as it is known; what is not known is taken as right."""
    shape = preset.config.model
    heads = getattr(text, "num_key_value_heads", None) or (shape and shape.num_kv_heads)
    head_dim = _head_dim(text) or (shape and shape.head_dim)
    if heads and head_dim:
        preset.check_shape(num_layers, heads, head_dim, layers)
        preset.layout(head_dim)


def _check_weights(preset: Preset, config: Any, allow_other: bool) -> None:
    """A model that was built in memory has no name: nothing is known of its weights."""
    name = getattr(config, "_name_or_path", "")
    model = Served(name, getattr(config, "_commit_hash", None))
    if name and (warning := preset.check_weights(model, allow_other)):
        _logger.warning("%s", warning)


def _head_dim(text: Any) -> int | None:
    """None where the config does not say; Qwen2's and others' say it by the width of all heads."""
    if own := getattr(text, "head_dim", None):
        return own
    width, heads = (getattr(text, one, None) for one in ("hidden_size", "num_attention_heads"))
    return width // heads if width and heads else None


def _uncompressed_bytes(layer: CompressedLayer) -> int:
    batch, heads, _, head_dim = layer.keys.shape
    return 2 * batch * heads * layer.get_seq_length() * head_dim * layer.keys.element_size()
