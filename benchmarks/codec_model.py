"""The model of the codec study: its K, V and queries on calibration text, and its answers when K
and V are stored some way. Windows are batched; everything is float32 on one device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from codec_quantizers import Statistics, set_fitted_samples
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache

from vllm_kvpca.calibration import text
from vllm_kvpca.calibration.collect import attention_shape, first_position, observed
from vllm_kvpca.codec import hadamard_basis

BIAS_BLOCK = 128
"""Tokens for which the bias of K is turned to one position, the middle of them."""
BIAS_SPEED = 0.1 / BIAS_BLOCK
"""Radians per token of the fastest RoPE pair whose bias is removed: the tokens at the ends of a
block see it turned by 0.05."""
Change = Callable[[int, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(layer, K, V), (batch, kv_heads, tokens, D) each, to what attention sees instead."""


class Changed(DynamicCache):
    """A cache for one forward pass that hands attention what `change` makes of K and V."""

    def __init__(self, config: Any, layers: Sequence[int], change: Change | None) -> None:
        super().__init__(config=config)
        self.changed = set(layers) if change else set()
        self.change = change

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any):
        if layer_idx in self.changed:
            return self.change(layer_idx, key_states, value_states)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


class Model:
    """A causal language model of transformers, with its tokenizer.

    Attributes:
        shape: layers and heads that are compressed.
        first: position of a sequence's first token.
        cos, sin: (tokens, D) of the rotary embedding of those layers.
    """

    def __init__(self, folder: str, device: str, window: int, batch: int, offset: int = 0) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if getattr(model.config.get_text_config(), "final_logit_softcapping", None):
            raise SystemExit("models that cap their logits are not supported")
        self.model = model.to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.device, self.window, self.batch = device, window, batch
        self.shape = attention_shape(self.model)
        self.offset = offset
        self._begin_at(0)

    def _turns(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens, D) cosines and sines of the rotary embedding."""
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None) or []
        by_kind = ["full_attention"] if "sliding_attention" in kinds else []
        rotary = self.model.base_model.rotary_emb
        cos, sin = rotary(torch.zeros(1, device=self.device), positions[None], *by_kind)
        return cos[0].float(), sin[0].float()

    def evaluate_far(self) -> None:
        """From now on a sequence's first token stands at `offset`. Attention sees no difference
        (RoPE is relative), but K as it is stored turns."""
        self._begin_at(self.offset)

    def _begin_at(self, first: int) -> None:
        self.first = first
        self.cos, self.sin = self._turns(torch.arange(self.window, device=self.device) + first)

    def rotate(self, x: torch.Tensor, sign: int = 1) -> torch.Tensor:
        """RoPE on (..., tokens, D); with sign -1 its inverse."""
        cos, sin = self.cos[: x.shape[-2]], self.sin[: x.shape[-2]] * sign
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def turned_bias(self, layer: int, tokens: int) -> torch.Tensor:
        """What K's bias adds to K after RoPE, (kv_heads, tokens, D), in the pairs that turn slowly;
        the same for all tokens of a block, and 0 for models without a bias."""
        bias = self.model.base_model.layers[layer].self_attn.k_proj.bias
        if bias is None:
            return torch.zeros((), device=self.device)
        positions = torch.arange(tokens, device=self.device) + self.first
        cos, sin = self._turns(positions // BIAS_BLOCK * BIAS_BLOCK + BIAS_BLOCK // 2)
        by_head = bias.detach().float().unflatten(0, (-1, 1, self.shape.head_dim))
        first, second = by_head.chunk(2, -1)
        turned = torch.cat((first, second), -1) * cos + torch.cat((-second, first), -1) * sin
        cos, sin = self._turns(torch.ones(1, device=self.device, dtype=torch.long))
        return turned * (torch.atan2(sin[0], cos[0]) < BIAS_SPEED)

    @torch.no_grad()
    def forward(self, windows: list[list[int]], change: Change | None) -> torch.Tensor:
        """(windows, tokens, hidden) last hidden states."""
        ids = torch.tensor(windows, device=self.device)
        cache = Changed(self.model.config, self.shape.layers, change)
        positions = torch.arange(ids.shape[1], device=self.device)[None] + self.first
        base = self.model.base_model
        return base(ids, position_ids=positions, past_key_values=cache).last_hidden_state

    def hidden(self, windows: list[list[int]], change: Change | None) -> Iterator[torch.Tensor]:
        """(tokens - 1, hidden) of each window: what predicts its tokens but the first."""
        for start in range(0, len(windows), self.batch):
            yield from self.forward(windows[start : start + self.batch], change)[:, :-1]

    @torch.no_grad()
    def logprobs(self, hidden: torch.Tensor) -> torch.Tensor:
        """(tokens, vocabulary) log-probabilities, nats."""
        return self.model.lm_head(hidden.to(self.device)).log_softmax(-1)

    def statistics(
        self, files: Sequence[Path], tokens: int, context: int = 0
    ) -> dict[str, Statistics]:
        """Of V, of K, of K before RoPE ("pre") and of K without its bias ("bias"), over calibration
        text, whose windows begin all over `context` positions (see `collect.first_position`)."""
        sums = Sums(self)
        windows = text.windows(files, self.tokenizer, self.window, tokens)
        with observed(self.model, sums.queries):
            for index, window in enumerate(windows):
                self._begin_at(first_position(index, context - len(window)))
                self.forward([window], sums.see)
                sums.tokens += len(window)
        self._begin_at(0)
        set_fitted_samples(torch.cat(sums.samples))
        weight = {"v": self.output_weight(), "k": sums.mean("q"), "pre": sums.mean("q pre")}
        weight["bias"] = weight["k"]
        return {
            which: Statistics(sums.mean(which), sums.mean(f"{which} mean"), weight[which])
            for which in weight
        }

    def output_weight(self) -> torch.Tensor:
        """(layers, kv_heads, D, D) float64: W W^T of the output projection's rows for one query
        head, summed over the query heads of each KV head."""
        found = []
        for layer in self.shape.layers:
            w = self.model.base_model.layers[layer].self_attn.o_proj.weight.detach().double()
            w = w.mT.reshape(self.shape.num_kv_heads, -1, self.shape.head_dim, w.shape[0])
            found.append((w @ w.mT).sum(1).cpu())
        return torch.stack(found)


class Sums:
    """Sums over calibration tokens: x x^T and x of K, V, queries, after and before RoPE, and of K
    without its bias."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokens = 0
        self.found: dict[str, dict[int, torch.Tensor]] = {}
        self.samples: list[torch.Tensor] = []
        self.flat = hadamard_basis(model.shape.head_dim).to(model.device)

    def mean(self, which: str) -> torch.Tensor:
        layers = self.model.shape.layers
        return torch.stack([self.found[which][layer].cpu() for layer in layers]) / self.tokens

    def see(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        turned = self.model.turned_bias(layer, k.shape[-2])
        kinds = {"k": k, "pre": self.model.rotate(k, -1), "bias": k - turned, "v": v}
        for which, x in kinds.items():
            x = x[0].double()
            self._add(which, layer, x.mT @ x)
            self._add(f"{which} mean", layer, x.sum(1))
        y = v[..., ::512, :] @ self.flat  # what a Hadamard rotation makes of V
        self.samples.append((y / y.square().mean(-1, keepdim=True).sqrt()).flatten().cpu())
        return k, v

    def queries(self, layer: int, q: torch.Tensor) -> None:
        if layer in self.model.shape.layers:
            for which, x in (("q", q), ("q pre", self.model.rotate(q, -1))):
                x = x[0].unflatten(0, (self.model.shape.num_kv_heads, -1)).flatten(1, 2).double()
                self._add(which, layer, x.mT @ x)

    def _add(self, which: str, layer: int, value: torch.Tensor) -> None:
        layers = self.found.setdefault(which, {})
        layers[layer] = layers[layer] + value if layer in layers else value
