"""Second moments of K, V and queries over calibration text, one window at a time.

K and V are taken where a model hands them to its cache (K after RoPE), queries where it calls
its attention function, so no module has to be known by name. Nothing but the sums is kept:
of x x^T and of x, in float64, per layer and KV head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicCache, DynamicIndexedLayer, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_kvpca.codec.key_bias import KeyBias
from vllm_kvpca.errors import UnsupportedError

OBSERVED = "kvpca_observed"
"""Name under which transformers knows the attention that shows its queries."""


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
        sums: "k", "v", "q" to {layer: (kv_heads, head_dim, head_dim) float64 sum of x x^T};
            "q" over all query heads that read the KV head.
        firsts: the same keys to {layer: (kv_heads, head_dim) float64 sum of x}.
        windows: windows seen.
        key_biases: what was taken out of K, by layer; empty: nothing.
    """

    sums: dict[str, dict[int, torch.Tensor]]
    tokens: int = 0
    firsts: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    windows: int = 0
    key_biases: dict[int, KeyBias] = field(default_factory=dict)

    def add(self, which: str, layer: int, states: torch.Tensor) -> None:
        """Add the (1, kv_heads, rows, head_dim) states of one layer."""
        x = states[0].double()
        for sums, new in (
            (self.sums[which], x.transpose(-1, -2) @ x),
            (self.firsts.setdefault(which, {}), x.sum(-2)),
        ):
            sums[layer] = sums[layer].add_(new) if layer in sums else new

    def mean(self, which: str) -> torch.Tensor:
        """E[x x^T], (layers, kv_heads, head_dim, head_dim) float64, layers in ascending order.

        Of the queries it is the sum over the heads that share a KV head.
        """
        sums = self.sums[which]
        return torch.stack([sums[layer].cpu() for layer in sorted(sums)]) / self.tokens

    def only(self, names: Iterable[str]) -> Moments:
        """The same sums of some of "k", "v", "q"."""
        sums = {which: self.sums[which] for which in names}
        return Moments(sums, self.tokens, key_biases=self.key_biases)


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
    moments: Moments | None = None,
    after_window: Callable[[Moments], None] = lambda moments: None,
    key_biases: Mapping[int, KeyBias] = MappingProxyType({}),
    context: int = 0,
) -> Moments:
    """Run the model over token windows and sum up x x^T and x of what it caches.

    Args:
        model: a transformers model in evaluation mode.
        wanted: of "k", "v" and "q".
        windows: token ids; every window is a sequence of its own.
        advance: called with the tokens of each finished window.
        moments: of windows that an earlier run has seen; they are added to.
        after_window: called with all there is after each window.
        key_biases: by layer, what is taken out of K first (calibration.key_bias).
        context: windows begin at positions spread over so many tokens; 0: all at position 0. RoPE
            turns what all keys share by their position, so a basis that has seen the first
            positions alone does not fit far ones. To attention the start makes no difference.

    Raises:
        UnsupportedError: queries are wanted, and the model's attention cannot be observed.
    """
    found = moments or Moments({which: {} for which in wanted})
    found.key_biases = dict(key_biases)
    first = 0

    def add(layer: int, k: torch.Tensor, v: torch.Tensor) -> None:
        if layer in key_biases:
            positions = torch.arange(first, first + k.shape[2], device=k.device)
            k = k.float() - key_biases[layer].turned(positions).transpose(0, 1)
        for which in found.sums.keys() & {"k", "v"}:
            found.add(which, layer, {"k": k, "v": v}[which])

    def add_queries(layer: int, queries: torch.Tensor) -> None:
        if layer in shape.layers:
            found.add("q", layer, queries.unflatten(1, (shape.num_kv_heads, -1)).flatten(2, 3))

    with observed(model, add_queries) if "q" in found.sums else nullcontext():
        for window in windows:
            first = first_position(found.windows, context - len(window)) if context else 0
            _forward(model, window, _Probe(model.config, set(shape.layers), add), first)
            found.tokens += len(window)
            found.windows += 1
            advance(len(window))
            after_window(found)
    return found


def first_position(index: int, room: int) -> int:
    """Where window `index` begins: 0 for the first, then spread evenly over `room` positions,
    however many windows there will be (multiples of the golden ratio)."""
    return int(index * 0.6180339887498949 % 1 * max(0, room))


def positions_of(model: Any) -> int:
    """Positions that a model can be given tokens at; 0 where its positions are no RoPE's."""
    config = model.config.get_text_config(decoder=True)
    if getattr(model.base_model, "rotary_emb", None) is None:
        return 0
    return getattr(config, "max_position_embeddings", None) or 0


@contextmanager
def observed(model: Any, visit: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """Show the queries of every attention call, (1, heads, tokens, head_dim), to `visit`."""
    before = model.config._attn_implementation
    if before != "sdpa":
        raise UnsupportedError(
            f"{model.config.model_type} computes attention as {before!r}, and a basis weighted by "
            "the queries needs PyTorch's (sdpa): calibrate another format."
        )

    def attend(module: Any, query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        visit(module.layer_idx, query)
        return sdpa_attention_forward(module, query, *args, **kwargs)

    AttentionInterface.register(OBSERVED, attend)
    AttentionMaskInterface.register(OBSERVED, sdpa_mask)
    model.set_attn_implementation(OBSERVED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


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
def _forward(model: Any, window: list[int], cache: DynamicCache, first: int = 0) -> None:
    ids = torch.tensor([window], device=model.device)
    where = {}
    if first:
        where["position_ids"] = torch.arange(first, first + len(window), device=model.device)[None]
    # The base model: no logits over the vocabulary, which nobody reads.
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True, **where)
