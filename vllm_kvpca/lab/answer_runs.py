"""Whole measurements of answers: hidden facts, greedy divergence, benchmarks of lm-eval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_kvpca.lab import teacher_forced as reading
from vllm_kvpca.lab import texts
from vllm_kvpca.lab.against_stock import (
    ENGINE,
    Done,
    Thresholds,
    nothing_done,
    overlaps,
    record_of,
)
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.measurements import divergence as divergence_
from vllm_kvpca.lab.measurements import identity, needle, tasks
from vllm_kvpca.lab.record import Record


def hidden_facts(
    task: str,
    model: str,
    preset_names: Sequence[str],
    text: Sequence[Path],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int = 8,
    chunk: int = 64,
    thresholds: Sequence[Thresholds] = ((0, 0),),
    through: str = ENGINE,
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "needle" or "recall": one for each preset and pair of thresholds.

    Args:
        task: one of needle.TASKS.
        lengths, depths, samples: see needle.make_prompts.
        chunk: tokens of each prompt per step.
        through: "engine", or "transformers" for load_preset_cache.
        more: further EngineSettings.
    """
    files = texts.find_texts(text) if task == "needle" else []
    seen = overlaps(preset_names, files)
    tokenizer = texts.tokenizer_of(model)
    prompts = needle.make_prompts(task, tokenizer, files, lengths, depths, samples, seed)
    tokens = [prompt.tokens for prompt in prompts]
    wanted = [
        reading.settings_for(model, tokens, chunk, name, pair, seed=seed, **more)
        for name in preset_names
        for pair in thresholds
    ]
    todo = [settings for settings in wanted if not done(settings)]
    readings = _read(todo, prompts, chunk, through)
    if not todo:
        return
    stock, _ = next(readings)
    chosen = {
        "lengths": list(lengths),
        "depths": sorted(depths),
        "samples": samples,
        "through": through,
    }
    for settings, (scores, facts) in zip(todo, readings, strict=True):
        results = needle.compare(stock, scores, lengths, depths, seed) | facts
        used = chosen | {"calibration_overlap": seen[settings.preset]}
        slug = [facts["dtype"], "" if through == ENGINE else through]
        yield record_of(task, settings, results, used, files, *slug)


def _read(
    todo: Sequence[EngineSettings], prompts: Sequence[needle.Prompt], chunk: int, through: str
) -> Iterator[tuple[list[needle.Score], dict[str, Any]]]:
    """Scores of stock and then of each preset, with the boundary's step and the dtype."""
    if through != ENGINE:
        from vllm_kvpca.lab import through_transformers as transformers

        yield from transformers.read_answers(todo, prompts, chunk)
        return
    for settings in (todo[0].model_copy(update={"preset": STOCK}), *todo):
        read = reading.read(settings, [prompt.tokens for prompt in prompts], top=1)
        logprobs = (values[:, 0] for values in read.logprobs)
        likeliest = (values[:, 0] == values[:, 1] for values in read.ids)
        scores = [
            needle.score(*parts, read.policy)
            for parts in zip(prompts, logprobs, likeliest, read.chunks, strict=True)
        ]
        align = read.policy.align if read.policy else 0
        yield scores, {"boundary_step_tokens": align, "dtype": read.dtype}


def divergence(
    model: str,
    preset_names: Sequence[str],
    text: Sequence[Path],
    prompts: int = 32,
    prompt_tokens: int = 1024,
    generated: int = 128,
    thresholds: Sequence[Thresholds] = ((0, 0), (512, 256)),
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "divergence": one for each preset and pair of thresholds, and a control.

    The control is stock against stock with steps of half as many tokens, as in `runs.identity`.
    """
    files = texts.find_texts(text)
    seen = overlaps(preset_names, files)
    windows = texts.windows(texts.tokenizer_of(model), files, prompts, prompt_tokens)
    common = EngineSettings(
        model=model,
        max_model_len=prompt_tokens + generated,
        max_num_seqs=prompts,
        seed=seed,
        **more,
    )
    wanted = [
        common.model_copy(update={"max_num_batched_tokens": common.max_num_batched_tokens // 2})
    ]
    for name in preset_names:
        for after, recent in thresholds:
            changes = {"preset": name, "compress_after": after, "keep_recent": recent}
            wanted.append(common.model_copy(update=changes))
    todo = [settings for settings in wanted if not done(settings)]
    if not todo:
        return
    stock, dtype = identity.answer(common, windows, generated)
    for settings in todo:
        other, _ = identity.answer(settings, windows, generated)
        results = divergence_.compare(stock, other, [prompt_tokens] * prompts) | {"dtype": dtype}
        chosen = {
            "prompts": prompts,
            "prompt_tokens": prompt_tokens,
            "calibration_overlap": seen.get(settings.preset),
        }
        yield record_of("divergence", settings, results, chosen, files, dtype)


def lm_eval_tasks(
    model: str,
    preset_names: Sequence[str],
    chosen: tasks.Chosen,
    chunk: int = 64,
    thresholds: Sequence[Thresholds] = ((0, 0),),
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "tasks": one for each preset and pair of thresholds."""
    tasks.check(chosen)
    common = EngineSettings(model=model, chunk=chunk, seed=seed, **more)
    wanted = [
        common.model_copy(update={"preset": name, "compress_after": after, "keep_recent": recent})
        for name in preset_names
        for after, recent in thresholds
    ]
    todo = [settings for settings in wanted if not done(settings)]
    if not todo:
        return
    stock = tasks.measure(common, chosen)
    used = chosen.model_dump(mode="json", exclude={"include_path"})
    for settings in todo:
        results = tasks.compare(stock, tasks.measure(settings, chosen))
        yield record_of("tasks", settings, results, used, (), *chosen.tasks)
