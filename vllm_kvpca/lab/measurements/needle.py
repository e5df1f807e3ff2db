"""Facts hidden in a long prompt and asked for at its end (needle, recall), over depth x length.

Answers are read teacher-forced: if each of its tokens is the likeliest one given those before,
the greedy answer is right. Log-probabilities of the answer's tokens show what whole answers of a
small model do not. The prompts are those of lab.hidden_facts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vllm_kvpca.calibration import statistics
from vllm_kvpca.calibration.statistics import Floats
from vllm_kvpca.lab import presets, teacher_forced, texts
from vllm_kvpca.lab.against_stock import (
    ENGINE,
    TRANSFORMERS,
    Done,
    Thresholds,
    nothing_done,
    overlaps,
    record_of,
    variants,
)
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.hidden_facts import TASKS, Prompt, Question, make_prompts
from vllm_kvpca.lab.progress import steps
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import PRESET_HEADS, THRESHOLDS_HEAD, Table, after_and_recent, stored
from vllm_kvpca.pages.boundary import Policy


def run(
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
        task: one of hidden_facts.TASKS.
        lengths, depths, samples: see hidden_facts.make_prompts.
        chunk: tokens of each prompt per step.
        through: "engine", or "transformers" for load_preset_cache.
        more: further EngineSettings.
    """
    presets.check(preset_names, model, peers=through == ENGINE)
    files = texts.find_texts(text) if task == "needle" else []
    seen = overlaps(preset_names, files)
    tokenizer = texts.tokenizer_of(model)
    prompts = make_prompts(task, tokenizer, files, lengths, depths, samples, seed)
    tokens = [prompt.tokens for prompt in prompts]
    common = teacher_forced.settings_for(model, tokens, chunk, seed=seed, **more)
    todo = variants(common, preset_names, thresholds, done)
    if not todo:
        return
    readings = _read(todo, prompts, chunk, through)
    stock, _ = next(readings)
    chosen = {
        "lengths": list(lengths),
        "depths": sorted(depths),
        "samples": samples,
        "through": through,
    }
    for settings, (scores, facts) in zip(todo, readings, strict=True):
        results = compare(stock, scores, lengths, depths, seed) | facts
        used = chosen | {"calibration_overlap": seen[settings.preset]}
        slug = [facts["dtype"], "" if through == ENGINE else through]
        yield record_of(task, settings, results, used, files, *slug)


def _read(
    todo: Sequence[EngineSettings], prompts: Sequence[Prompt], chunk: int, through: str
) -> Iterator[tuple[list[Score], dict[str, Any]]]:
    """Scores of stock and then of each preset, with the boundary's step and the dtype."""
    if through != ENGINE:
        yield from read_through_transformers(todo, prompts, chunk)
        return
    for settings in (todo[0].model_copy(update={"preset": STOCK}), *todo):
        read = teacher_forced.read(settings, [prompt.tokens for prompt in prompts], top=1)
        logprobs = (values[:, 0] for values in read.logprobs)
        likeliest = (values[:, 0] == values[:, 1] for values in read.ids)
        scores = [
            score(*parts, read.policy)
            for parts in zip(prompts, logprobs, likeliest, read.chunks, strict=True)
        ]
        align = read.policy.align if read.policy else 0
        yield scores, {"boundary_step_tokens": align, "dtype": read.dtype}


def read_through_transformers(
    settings: Sequence[EngineSettings], prompts: Sequence[Prompt], chunk: int
) -> Iterator[tuple[list[Score], dict[str, Any]]]:
    """Scores of the prompts, for stock and then for each of `settings`, which share a model.

    Yields:
        Scores, and the boundary's step and the dtype for the record.
    """
    # Imported late: it loads transformers' models, which no engine needs.
    from vllm_kvpca.lab import through_transformers as reader

    network = reader.load(settings[0].model, settings[0].dtype)
    every = [reader.stock_of(settings[0]), *settings]
    makers = [reader.cache_maker(one) for one in every]
    policies = [None if one.preset == STOCK else reader.policy_of(one) for one in every]
    scores: list[list[Score]] = [[] for _ in every]
    total = sum(-(-len(prompt.tokens) // chunk) for prompt in prompts)
    with steps(TRANSFORMERS, total) as step:
        for prompt in prompts:
            chunks = reader.chunks_of(len(prompt.tokens), chunk)
            found = _targets(network, makers, prompt.tokens, chunk, step)
            for mine, policy, target in zip(scores, policies, found, strict=True):
                mine.append(score(prompt, *target, chunks, policy))
    for policy, mine in zip(policies, scores, strict=True):
        align = policy.align if policy else 0
        yield mine, {"boundary_step_tokens": align, "dtype": reader.dtype_of(network)}


def _targets(
    network: Any,
    makers: Sequence[Any],
    tokens: Sequence[int],
    chunk: int,
    step: Callable[[], None],
) -> list[tuple[Floats, NDArray[np.bool_]]]:
    """Log-probability of each token after the first, and whether none is likelier, per cache."""
    import torch

    from vllm_kvpca.lab import through_transformers as reader

    following = torch.tensor(tokens[1:], device=network.device)
    found: list[tuple[list[float], list[bool]]] = [([], []) for _ in makers]
    for _, positions, parts in reader.read(network, makers, [tokens], chunk, step):
        target = following[positions][:, None]
        for (logprobs, likeliest), x in zip(found, parts, strict=True):
            x = x[0, : len(target)]
            logprobs += x.gather(-1, target)[:, 0].tolist()
            likeliest += (x.argmax(-1) == target[:, 0]).tolist()
    return [(np.array(logprobs), np.array(likeliest)) for logprobs, likeliest in found]


@dataclass(frozen=True)
class Score:
    """Of one prompt, its questions by depth.

    Attributes:
        right: (questions,) share of the answer's tokens that are the likeliest.
        logprob: (questions,) mean log-probability of the answer's tokens, nats.
        archived: (questions,) share of the fact's tokens that were archived when it was asked for.
    """

    right: Floats
    logprob: Floats
    archived: Floats


def score(
    prompt: Prompt,
    logprobs: Floats,
    likeliest: NDArray[np.bool_],
    chunks: Sequence[int],
    policy: Policy | None,
) -> Score:
    """What one reading of a prompt says about its answers.

    Args:
        logprobs, likeliest: (tokens - 1,) of each token after the first, its log-probability and
            whether none was likelier.
        chunks: tokens computed by each step.
        policy: None where nothing is archived.
    """
    by_depth = sorted(prompt.questions, key=lambda question: question.depth)
    answers = [slice(q.answer[0] - 1, q.answer[1] - 1) for q in by_depth]
    return Score(
        right=np.array([np.mean(likeliest[a]) for a in answers]),
        logprob=np.array([np.mean(logprobs[a]) for a in answers]),
        archived=np.array([_archived(q, chunks, policy) for q in by_depth]),
    )


def _archived(question: Question, chunks: Sequence[int], policy: Policy | None) -> float:
    """A step attends to what was archived before it."""
    if policy is None:
        return 0.0
    asking = question.answer[0] - 1  # this token predicts the answer's first
    before = max(int(x) for x in (0, *np.cumsum(chunks)) if x <= asking)
    first, end = question.fact
    return min(max(policy.boundary(before) - first, 0), end - first) / (end - first)


def compare(
    stock: Sequence[Score],
    other: Sequence[Score],
    lengths: Sequence[int],
    depths: Sequence[float],
    seed: int,
) -> dict[str, Any]:
    """The results of a record: a cell for each length and depth, then all of them together.

    Args:
        stock, other: of the same prompts, as `make_prompts` orders them.
    """
    shape = (len(lengths), len(stock) // len(lengths), len(depths))
    a, b = _stacked(stock, shape), _stacked(other, shape)
    cells = [
        {"length_tokens": length, "depth": depth, "answers": shape[1]}
        | {"archived_share": float(b["archived"][i, :, j].mean())}
        | _figures({k: v[i, :, j] for k, v in a.items()}, {k: v[i, :, j] for k, v in b.items()})
        for i, length in enumerate(lengths)
        for j, depth in enumerate(sorted(depths))
    ]
    change = (b["logprob"] - a["logprob"]).mean(2).ravel()
    low, high = statistics.bootstrap_mean(change, seed)
    return {
        "cells": cells,
        "answers": int(np.prod(shape)),
        **_figures(a, b),
        "logprob_change_ci95": [low, high],
    }


def _stacked(scores: Sequence[Score], shape: tuple[int, ...]) -> dict[str, Floats]:
    names = ("right", "logprob", "archived")
    return {name: np.stack([getattr(s, name) for s in scores]).reshape(shape) for name in names}


def _figures(stock: dict[str, Floats], other: dict[str, Floats]) -> dict[str, Any]:
    figures = {}
    for suffix, scores in (("_stock", stock), ("", other)):
        figures[f"exact{suffix}"] = float(np.mean(scores["right"] == 1))
        figures[f"token_accuracy{suffix}"] = float(scores["right"].mean())
        figures[f"logprob{suffix}"] = float(scores["logprob"].mean())
    return figures | {"logprob_change": figures["logprob"] - figures["logprob_stock"]}


def _rows(record: Record) -> list[list[str]]:
    results: Any = record.results
    low, high = results["logprob_change_ci95"]
    archived = [cell["archived_share"] for cell in results["cells"]]
    return [
        [
            *stored(record),
            after_and_recent(record),
            str(record.settings["through"]),
            results["dtype"],
            f"{sum(archived) / len(archived):.0%}",
            f"{results['exact_stock']:.1%}",
            f"{results['exact']:.1%}",
            f"{results['token_accuracy_stock']:.1%}",
            f"{results['token_accuracy']:.1%}",
            f"{results['logprob_change']:+.4f} ({low:+.4f} to {high:+.4f})",
            f"{results['answers']:,}",
        ]
    ]


_HEADS = [
    *PRESET_HEADS,
    THRESHOLDS_HEAD,
    "through",
    "dtype",
    "facts archived",
    "answers right, stock",
    "answers right",
    "digits right, stock",
    "digits right",
    "log-probability of a digit, change (95 % interval)",
    "answers",
]
TABLES = {task: Table(_HEADS, _rows, f"vllm-kvpca evaluate {task}") for task in TASKS}
