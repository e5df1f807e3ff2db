"""The same readings through transformers and `load_preset_cache`, without vLLM.

One model reads each chunk once for every cache, side by side, so that whole distributions can be
compared and none is stored. Chunks and the boundary's steps are those of the served engine, so
both archive the same tokens at the same time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vllm_kvpca.calibration import statistics as measures
from vllm_kvpca.errors import OptionsError
from vllm_kvpca.hf_cache import load_preset_cache
from vllm_kvpca.lab import presets
from vllm_kvpca.lab.against_stock import TRANSFORMERS
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.measurements import needle, quality
from vllm_kvpca.lab.progress import steps
from vllm_kvpca.pages import raw_token_bytes
from vllm_kvpca.pages.block_sizes import plan_pages
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
    plan = plan_pages(
        raw_token_bytes(head_dim),
        load_preset(settings.preset).layout(head_dim).content_bytes,
        compress_after=after,
        keep_recent=recent,
        max_model_len=settings.max_model_len,
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


def compare_quality(
    settings: Sequence[EngineSettings],
    windows: Sequence[Sequence[int]],
    chunk: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Results of quality records, one for each of `settings`, which share a model.

    The KL divergence is over the whole vocabulary. The lower bound is taken as through the
    engine, so that both can be compared.
    """
    network = load(settings[0].model, settings[0].dtype)
    makers = [cache_maker(one) for one in (_stock(settings[0]), *settings)]
    shape = (len(makers), len(windows), len(windows[0]) - 1)
    target, full, bound, same = (np.zeros(shape) for _ in range(4))
    ids = torch.tensor(windows, device=network.device)
    total = -(-len(windows) // ROWS) * -(-len(windows[0]) // chunk)
    with steps(TRANSFORMERS, total) as step:
        for rows, positions, parts in read(network, makers, windows, chunk, step):
            last = min(positions.stop, shape[2])  # nothing is known to follow a window
            where = (rows, slice(positions.start, last))
            parts = [x[:, : last - positions.start] for x in parts]
            following = ids[rows, positions.start + 1 : last + 1]
            likely = parts[0].topk(quality.TOP)
            for i, x in enumerate(parts):
                target[i][where] = x.gather(-1, following[..., None])[..., 0].cpu()
                full[i][where] = (parts[0].exp() * (parts[0] - x)).sum(-1).cpu()
                same[i][where] = (x.argmax(-1) == likely.indices[..., 0]).cpu()
                bound[i][where] = _bound(likely, x)
    chunks = _chunks(len(windows[0]), chunk)
    results = []
    for i, one in enumerate(settings, 1):
        policy = policy_of(one)
        low, high = measures.bootstrap_change(target[0], target[i], seed)
        results.append(
            {
                "perplexity_stock": measures.perplexity(target[0]),
                "perplexity": measures.perplexity(target[i]),
                "perplexity_change": measures.perplexity_change(target[0], target[i]),
                "perplexity_change_ci95": [low, high],
                "kl_mean_nats": float(full[i].mean()),
                "kl_p99_nats": float(np.quantile(full[i], 0.99)),
                "kl_lower_bound_mean_nats": float(bound[i].mean()),
                "top1_agreement": float(same[i].mean()),
                "archived_share_of_attended_keys": quality.archived_share(chunks, policy),
                "predicted_tokens": int(target[0].size),
                "boundary_step_tokens": policy.align,
                "dtype": _dtype(network),
            }
        )
    return results


def _bound(likely: Any, other: torch.Tensor) -> measures.Floats:
    """KL over stock's likeliest tokens and one bucket for the rest; (rows, positions)."""
    k = likely.indices.shape[-1]
    token_ids = likely.indices.reshape(-1, k).cpu().numpy()
    own = likely.values.reshape(-1, k).double().cpu().numpy()
    theirs = other.gather(-1, likely.indices).reshape(-1, k).double().cpu().numpy()
    flat = measures.kl_lower_bound(token_ids, own, token_ids, theirs)
    return flat.reshape(likely.indices.shape[:-1])


def read_answers(
    settings: Sequence[EngineSettings], prompts: Sequence[needle.Prompt], chunk: int
) -> Iterator[tuple[list[needle.Score], dict[str, Any]]]:
    """Scores of the prompts, for stock and then for each of `settings`, which share a model.

    Yields:
        Scores, and the boundary's step and the dtype for the record.
    """
    network = load(settings[0].model, settings[0].dtype)
    every = [_stock(settings[0]), *settings]
    makers = [cache_maker(one) for one in every]
    policies = [None if one.preset == STOCK else policy_of(one) for one in every]
    scores: list[list[needle.Score]] = [[] for _ in every]
    total = sum(-(-len(prompt.tokens) // chunk) for prompt in prompts)
    with steps(TRANSFORMERS, total) as step:
        for prompt in prompts:
            chunks = _chunks(len(prompt.tokens), chunk)
            found = _targets(network, makers, prompt.tokens, chunk, step)
            for mine, policy, target in zip(scores, policies, found, strict=True):
                mine.append(needle.score(prompt, *target, chunks, policy))
    for policy, mine in zip(policies, scores, strict=True):
        align = policy.align if policy else 0
        yield mine, {"boundary_step_tokens": align, "dtype": _dtype(network)}


def _targets(
    network: Any,
    makers: Sequence[CacheMaker],
    tokens: Sequence[int],
    chunk: int,
    step: Callable[[], None],
) -> list[tuple[measures.Floats, NDArray[np.bool_]]]:
    """Log-probability of each token after the first, and whether none is likelier, per cache."""
    following = torch.tensor(tokens[1:], device=network.device)
    found: list[tuple[list[float], list[bool]]] = [([], []) for _ in makers]
    for _, positions, parts in read(network, makers, [tokens], chunk, step):
        target = following[positions][:, None]
        for (logprobs, likeliest), x in zip(found, parts, strict=True):
            x = x[0, : len(target)]
            logprobs += x.gather(-1, target)[:, 0].tolist()
            likeliest += (x.argmax(-1) == target[:, 0]).tolist()
    return [(np.array(logprobs), np.array(likeliest)) for logprobs, likeliest in found]


def _dtype(network: Any) -> str:
    return str(network.dtype).removeprefix("torch.")


def _stock(settings: EngineSettings) -> EngineSettings:
    return settings.model_copy(update={"preset": STOCK})


def _chunks(length: int, chunk: int) -> list[int]:
    return [min(chunk, length - first) for first in range(0, length, chunk)]
