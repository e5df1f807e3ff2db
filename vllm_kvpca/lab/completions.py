"""Greedy completions by a served engine, each until the model ends it or a limit is reached.

Prompts are computed in small chunks, as everywhere here: of a prompt that one step computes whole,
nothing would be read from the archive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvpca.lab import engine, presets
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.progress import steps

MOST_AT_ONCE = 32


@dataclass(frozen=True)
class Completion:
    """What the model wrote.

    Attributes:
        cut: it was not at its end when the limit was reached.
    """

    tokens: list[int]
    text: str
    cut: bool


def settings_for(
    model: str,
    prompts: Sequence[Sequence[int]],
    most: int,
    chunk: int = 64,
    kv_gib: float = 2,
    dtype: str = "auto",
    **more: Any,
) -> EngineSettings:
    """Engine settings with which no sequence has to make room for another.

    Args:
        prompts: token ids.
        most: tokens of a completion.
        chunk: tokens of each prompt per step.
        more: further EngineSettings.
    """
    longest = max(map(len, prompts)) + most
    room = presets.sequences_that_fit(model, kv_gib, longest, dtype)
    at_once = min(len(prompts), room, MOST_AT_ONCE)
    return EngineSettings(
        model=model,
        max_model_len=longest,
        max_num_seqs=at_once,
        max_num_batched_tokens=at_once * chunk,
        chunk=chunk,
        kv_gib=kv_gib,
        dtype=dtype,
        **more,
    )


def complete(
    settings: EngineSettings,
    prompts: Sequence[Sequence[int]],
    most: int,
    stop: Sequence[str] = (),
) -> tuple[list[Completion], str]:
    """Completions in the order of the prompts, in a process of its own, and the engine's dtype.

    Args:
        prompts: token ids.
        most: tokens of a completion.
        stop: texts that end one; they are not part of it.
    """
    return engine.in_process(_complete, settings, prompts, most, stop)


def _complete(
    settings: EngineSettings, prompts: Sequence[Sequence[int]], most: int, stop: Sequence[str]
) -> tuple[list[Completion], str]:
    llm = engine.start(settings)
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=most, stop=list(stop))
    title = f"{settings.preset} {settings.compress_after}/{settings.keep_recent}"
    with steps(title, len(prompts)) as step:
        outputs = engine.run(llm, prompts, params, after_answer=step)
    written = [
        Completion(list(output.token_ids), output.text, output.finish_reason == "length")
        for output in (request.outputs[0] for request in outputs)
    ]
    return written, str(llm.llm_engine.model_config.dtype).removeprefix("torch.")
