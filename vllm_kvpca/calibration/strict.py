"""Teacher-forced with transformers, every token stored: the strictest measure of a format.

Each token attends to K and V as the archive would give them back, its own included. The served
engine is kinder: tokens of one step attend to each other raw, and recent tokens stay raw.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from vllm_kvpca.calibration.statistics import Floats
from vllm_kvpca.ops.layer_codec import LayerCodec, codec_of
from vllm_kvpca.preset import Preset


class StoredCache(DynamicCache):
    """A cache for one forward pass that hands attention what the archive would keep.

    Args:
        config: the model's.
        preset: how K and V are stored.
        layers: indices of the layers that are stored so; the others stay as they are.
        codecs: of layers, kept for further passes; filled as layers come by.
    """

    def __init__(
        self,
        config: Any,
        preset: Preset,
        layers: Collection[int],
        codecs: dict[int, LayerCodec],
    ) -> None:
        super().__init__(config=config)
        self._preset = preset
        self._stored = set(layers)
        self._codecs = codecs

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_idx not in self._stored:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx not in self._codecs:
            self._codecs[layer_idx] = _codec(self._preset, layer_idx, key_states)
        codec = self._codecs[layer_idx]
        return _kept(codec, key_states, "k"), _kept(codec, value_states, "v")


def _codec(preset: Preset, layer: int, states: torch.Tensor) -> LayerCodec:
    _, heads, _, head_dim = states.shape
    layout = preset.layout(head_dim)
    return codec_of(preset, layer, list(range(heads)), layout, states.dtype, states.device)


def _kept(codec: LayerCodec, states: torch.Tensor, which: str) -> torch.Tensor:
    rows = states.transpose(1, 2).flatten(0, 1)
    positions = torch.arange(states.shape[2], device=states.device).repeat(len(states))
    codes = codec.encode(rows, which, positions)
    kept = codec.restore(codec.decode(*codes, which), which, positions)
    return kept.to(states.dtype).unflatten(0, (len(states), -1)).transpose(1, 2)


@torch.no_grad()
def target_logprobs(
    model: Any,
    windows: Sequence[list[int]],
    preset: Preset | None = None,
    layers: Collection[int] = (),
    advance: Callable[[int], None] = lambda tokens: None,
) -> Floats:
    """Log-probability of each token of each window after its first, nats.

    Args:
        model: a causal language model of transformers.
        windows: token ids, all windows of one length.
        preset, layers: see StoredCache; None stores nothing.
        advance: called with the tokens of each finished window.

    Returns:
        (windows, tokens - 1) float64.
    """
    found = []
    codecs: dict[int, LayerCodec] = {}
    for window in windows:
        ids = torch.tensor([window], device=model.device)
        cache = StoredCache(model.config, preset, layers, codecs) if preset else DynamicCache()
        logits = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0, :-1]
        logprobs = logits.float().log_softmax(-1).gather(1, ids[0, 1:, None])
        found.append(logprobs[:, 0].double().cpu().numpy())
        advance(len(window))
    return np.stack(found)
