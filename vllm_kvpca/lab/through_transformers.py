"""The same readings through transformers and `load_preset_cache`, without vLLM.

One model reads each chunk once for every cache, side by side, so that whole distributions can be
compared and none is stored. Chunks and the boundary's steps are those of the served engine, so
both archive the same tokens at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.hf_cache import load_preset_cache
from vllm_kvpca.lab import presets
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.pages import raw_token_bytes
from vllm_kvpca.pages.block_sizes import choose_blocks
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.preset import load_preset

ROWS = 5
"""Sequences read at once: bounds the memory of their distributions over the vocabulary."""

CacheMaker = Callable[[Any], Any]
"""A transformers cache for a model's config."""


def load(model: str, dtype: str) -> Any:
    """The model, on a GPU if there is one.

    Args:
        dtype: "auto" is the model's own.

    Raises:
        OptionsError: an unknown dtype.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    if dtype not in ("auto", "bfloat16", "float16", "float32"):
        raise OptionsError(f"--dtype {dtype} is not known: use auto, bfloat16, float16 or float32.")
    disable_progress_bar()  # one bar at a time
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    return network.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def policy_of(settings: EngineSettings) -> Policy:
    """What a served engine with these settings follows, if all its layers have full attention."""
    head_dim = presets.head_dim(settings.model)
    after, recent = settings.compress_after, settings.keep_recent
    plan = choose_blocks(
        raw_token_bytes(head_dim),
        load_preset(settings.preset).layout(head_dim).content_bytes,
        compress_after=after,
        keep_recent=recent,
    )
    return Policy(after, recent, plan.align)


def cache_maker(settings: EngineSettings) -> CacheMaker:
    """A cache that stores what the engine of these settings does."""
    from transformers import DynamicCache

    if settings.preset == STOCK:
        return lambda config: DynamicCache(config=config)
    policy = policy_of(settings)

    def make(config: Any) -> Any:
        return load_preset_cache(
            settings.preset,
            compress_after=policy.compress_after,
            keep_recent=policy.keep_recent,
            align=policy.align,
            config=config,
        )

    return make


@torch.no_grad()
def read(
    network: Any,
    makers: Sequence[CacheMaker],
    windows: Sequence[Sequence[int]],
    chunk: int,
    step: Callable[[], None] = lambda: None,
) -> Iterator[tuple[slice, slice, list[torch.Tensor]]]:
    """Read windows of one length, chunk by chunk, once for each cache.

    Yields:
        Rows of `windows`, positions in them, and for each cache the log-probabilities that
        follow those positions, (rows, positions, vocabulary) float32.
    """
    ids = torch.tensor(windows, device=network.device)
    for first in range(0, len(ids), ROWS):
        rows = slice(first, first + ROWS)
        caches = [make(network.config) for make in makers]
        for begin in range(0, ids.shape[1], chunk):
            positions = slice(begin, min(begin + chunk, ids.shape[1]))
            logits = (
                network(ids[rows, positions], past_key_values=cache).logits for cache in caches
            )
            yield rows, positions, [x.float().log_softmax(-1) for x in logits]
            step()


def dtype_of(network: Any) -> str:
    return str(network.dtype).removeprefix("torch.")


def stock_of(settings: EngineSettings) -> EngineSettings:
    """The same without compression."""
    return settings.model_copy(update={"preset": STOCK})


def chunks_of(length: int, chunk: int) -> list[int]:
    """Tokens of each step."""
    return [min(chunk, length - first) for first in range(0, length, chunk)]
