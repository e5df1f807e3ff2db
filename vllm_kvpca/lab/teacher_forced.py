"""Teacher-forced reading: what one served engine says about every token of some prompts.

The prompts that are in the engine move in step, `chunk` tokens at a time. The tokens of one
chunk attend to each other raw, so a small chunk, and compress_after = keep_recent = 0, is what
"every token archived" comes closest to.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_kvpca.calibration import statistics
from vllm_kvpca.lab import engine
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.progress import steps
from vllm_kvpca.pages.boundary import Policy


@dataclass(frozen=True)
class Reading:
    """What one engine says.

    Attributes:
        ids, logprobs: of each prompt (tokens - 1, 1 + top): column 0 is the token that came, the
            others are the likeliest, best first; log-probabilities in nats.
        chunks: of each prompt, the tokens that each step computed.
        policy: with the step of the boundary; None in a stock engine.
        dtype: as resolved by the engine.
    """

    ids: list[statistics.Ints]
    logprobs: list[statistics.Floats]
    chunks: list[list[int]]
    policy: Policy | None
    dtype: str


def settings_for(
    model: str,
    prompts: Sequence[Sequence[int]],
    chunk: int,
    preset: str = engine.STOCK,
    thresholds: tuple[int, int] = (512, 256),
    **more: Any,
) -> EngineSettings:
    """Engine settings with which all prompts advance together, `chunk` tokens a step."""
    return EngineSettings(
        model=model,
        preset=preset,
        compress_after=thresholds[0],
        keep_recent=thresholds[1],
        max_model_len=max(map(len, prompts)) + 1,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=len(prompts) * chunk,
        chunk=chunk,
        **more,
    )


def read(settings: EngineSettings, prompts: Sequence[Sequence[int]], top: int) -> Reading:
    """Run one engine over the prompts, in a process of its own.

    Args:
        prompts: token ids.
        top: how many of the likeliest tokens to return.

    Raises:
        RuntimeError: the engine ran out of KV memory and computed tokens twice.
    """
    return engine.in_process(_read, settings, prompts, top)


def _read(settings: EngineSettings, prompts: Sequence[Sequence[int]], top: int) -> Reading:
    llm = engine.start(settings, max_logprobs=top)
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=1,
        prompt_logprobs=top,
        flat_logprobs=True,
        detokenize=False,
    )
    watched = engine.watch_chunks(llm)
    parts = [-(-len(prompt) // (settings.chunk or 1)) for prompt in prompts]
    # Where not all fit at once, the next begins when one is through.
    total = max(max(parts), sum(parts) // settings.max_num_seqs)
    title = f"{settings.preset} {settings.compress_after}/{settings.keep_recent}"
    with steps(title, total) as step:
        outputs = engine.run(llm, prompts, params, after_step=step)
    chunks = [watched[str(i)] for i in range(len(prompts))]
    if any(sum(parts) != len(prompt) for parts, prompt in zip(chunks, prompts, strict=True)):
        raise RuntimeError("a prompt was computed twice: give the engine more KV memory.")
    flat = [output.prompt_logprobs for output in outputs]
    return Reading(
        ids=[np.asarray(f.token_ids, np.int64).reshape(-1, 1 + top) for f in flat],
        logprobs=[np.asarray(f.logprobs, np.float64).reshape(-1, 1 + top) for f in flat],
        chunks=chunks,
        policy=engine.policy(llm),
        dtype=str(llm.llm_engine.model_config.dtype).removeprefix("torch."),
    )


def archived_share(chunks: Iterable[int], policy: Policy | None) -> float:
    """Average share of archived keys among those that a prompt's tokens attend to.

    All tokens of a chunk attend to the archive as it was before the chunk and to everything
    later raw, the chunk's own tokens included. The share is taken over all (query, key) pairs.

    Args:
        chunks: tokens computed by each step of one sequence, in order.
        policy: None where nothing is archived.
    """
    computed = archived = attended = 0
    for count in chunks:
        archived += count * policy.boundary(computed) if policy else 0
        attended += sum(range(computed + 1, computed + count + 1))
        computed += count
    return archived / attended if attended else 0.0
