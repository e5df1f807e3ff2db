"""Second moments of K and V over calibration text, one window at a time.

They are taken where a model hands K and V to its cache (K after RoPE), so no module has to be
known by name. Nothing but the sums is kept: E[x x^T] in float64, per layer and KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer

from vllm_kvpca.errors import UnsupportedError


@dataclass(frozen=True)
class AttentionShape:
    """What of a model can be calibrated.

    Attributes:
        num_layers: all layers of the model.
        num_kv_heads, head_dim: of its full-attention layers.
        layers: indices of the layers with full attention; the server compresses no others.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[int, ...]


@dataclass
class Moments:
    """Sums over tokens.

    Attributes:
        tokens: tokens seen.
        sums: "k", "v" to {layer: (kv_heads, head_dim, head_dim) float64 sum of x x^T}.
    """

    sums: dict[str, dict[int, torch.Tensor]]
    tokens: int = 0

    def add(self, which: str, layer: int, states: torch.Tensor) -> None:
        """Add the (1, kv_heads, tokens, head_dim) states of one layer."""
        x = states[0].double()
        outer = x.transpose(-1, -2) @ x
        have = self.sums[which].get(layer)
        self.sums[which][layer] = outer if have is None else have.add_(outer)

    def mean(self, which: str) -> torch.Tensor:
        """E[x x^T], (layers, kv_heads, head_dim, head_dim) float64, layers in ascending order."""
        sums = self.sums[which]
        return torch.stack([sums[layer].cpu() for layer in sorted(sums)]) / self.tokens


def attention_shape(model: Any) -> AttentionShape:
    """The model's layers and heads.

    Args:
        model: a transformers model.

    Raises:
        UnsupportedError: the model has no full-attention layer, or K and V of unequal sizes.
    """
    cache = DynamicCache(config=model.config)
    layers = tuple(i for i, layer in enumerate(cache.layers) if _is_full_attention(layer))
    if not layers:
        raise UnsupportedError(
            f"{model.config.model_type} has no layer with standard full attention, and others are "
            "not compressed: there is nothing to calibrate."
        )
    sizes: set[tuple[int, ...]] = set()
    probe = _Probe(model.config, set(layers), lambda _, k, v: sizes.update(_sizes(k, v)))
    _forward(model, [0], probe)
    if len(sizes) != 1 or set(layers) != probe.seen:
        raise UnsupportedError(
            f"{model.config.model_type} cannot be calibrated: its full-attention layers must all "
            f"cache K and V of one shape (found heads x head_dim {sorted(sizes)} in "
            f"{len(probe.seen)} of {len(layers)} layers)."
        )
    ((heads, head_dim),) = sizes
    return AttentionShape(len(cache.layers), heads, head_dim, layers)


def collect(
    model: Any,
    shape: AttentionShape,
    wanted: Iterable[str],
    windows: Iterable[list[int]],
    advance: Callable[[int], None] = lambda tokens: None,
) -> Moments:
    """Run the model over token windows and sum up x x^T of what it caches.

    Args:
        model: a transformers model in evaluation mode.
        wanted: "k" and/or "v".
        windows: token ids; every window is a sequence of its own.
        advance: called with the tokens of each finished window.
    """
    moments = Moments({which: {} for which in wanted})

    def add(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        for which in moments.sums:
            moments.add(which, layer, {"k": k, "v": v}[which])

    for window in windows:
        _forward(model, window, _Probe(model.config, set(shape.layers), add))
        moments.tokens += len(window)
        advance(len(window))
    return moments


class _Probe(DynamicCache):
    """A cache for one forward pass that shows K and V to `visit` and stores neither.

    Layers in `layers` must not be read again in the same pass; `seen` are those that were written.
    """

    def __init__(
        self,
        config: Any,
        layers: set[int],
        visit: Callable[[int, torch.Tensor, torch.Tensor], None],
    ) -> None:
        super().__init__(config=config)
        self._layers = layers
        self._visit = visit
        self.seen: set[int] = set()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx not in self._layers:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        self.seen.add(layer_idx)
        self._visit(layer_idx, key_states, value_states)
        return key_states, value_states


def _is_full_attention(layer: Any) -> bool:
    if isinstance(layer, DynamicIndexedLayer) or not isinstance(layer, DynamicLayer):
        return False
    return not layer.is_sliding


def _sizes(*states: torch.Tensor) -> set[tuple[int, ...]]:
    return {(x.shape[1], x.shape[3]) for x in states}


@torch.no_grad()
def _forward(model: Any, window: list[int], cache: DynamicCache) -> None:
    ids = torch.tensor([window], device=model.device)
    # The base model: no logits over the vocabulary, which nobody reads.
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
