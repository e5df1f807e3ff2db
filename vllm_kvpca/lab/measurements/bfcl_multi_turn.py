"""BFCL's multi-turn cases with long contexts, teacher-forced: how likely the reference's calls are.

The engine reads each conversation as the reference led it (lab.tool_conversations) and says how
likely every token of a call is, names and arguments, given all that came before. No model is
judged by what it would have made of its own mistakes: a small one loses the thread in the first
turn, with stock too, and the rest of its conversation says nothing about the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vllm_kvpca.calibration import statistics
from vllm_kvpca.calibration.statistics import Floats, Ints
from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import chat_template, completions, presets, teacher_forced, texts
from vllm_kvpca.lab import tool_conversations as conversations
from vllm_kvpca.lab.against_stock import (
    Done,
    Thresholds,
    nothing_done,
    overlaps_of_texts,
    record_of,
    variants,
)
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import PRESET_HEADS, THRESHOLDS_HEAD, Table, after_and_recent, stored
from vllm_kvpca.lab.tool_conversations import Conversation

Span = tuple[int, int]
"""First token of a call, and the one after its last."""


def run(
    model: str,
    preset_names: Sequence[str],
    limit: int | None = None,
    max_model_len: int = 32_768,
    chunk: int = 64,
    thresholds: Sequence[Thresholds] = ((0, 0), (512, 256)),
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "bfcl-multi-turn": one for each preset and pair of thresholds.

    Args:
        limit: conversations, from the first; None for all.
        max_model_len: tokens; longer conversations are left out.
        more: further EngineSettings.
    """
    presets.check(preset_names, model, peers=True)
    files = conversations.data_files()
    every = conversations.load(limit)
    said = (message["content"] for one in every for message in one.messages)
    seen = overlaps_of_texts(preset_names, said)
    read, left_out = prompts(texts.tokenizer_of(model), every, max_model_len)
    tokens = [ids for ids, _ in read]
    common = completions.settings_for(model, tokens, 1, chunk, seed=seed, **more)
    todo = variants(common, preset_names, thresholds, done)
    if not todo:
        return
    spans = [calls for _, calls in read]
    stock, _ = _scores(common, tokens, spans)
    lengths = list(map(len, tokens))
    chosen = {
        "limit": limit,
        "conversations_left_out": left_out,
        "prompt_tokens_quartiles": np.quantile(lengths, [0.25, 0.5, 0.75]).tolist(),
        "prompt_tokens_longest": max(lengths),
    }
    for settings in todo:
        other, facts = _scores(settings, tokens, spans)
        results = compare(stock, other, seed) | facts
        used = chosen | {"calibration_overlap": seen[settings.preset]}
        part = f"first-{limit}" if limit else ""
        yield record_of("bfcl-multi-turn", settings, results, used, files, facts["dtype"], part)


def prompts(
    tokenizer: Any, every: Sequence[Conversation], longest: int
) -> tuple[list[tuple[list[int], list[Span]]], int]:
    """Conversations as token ids, with where the calls are; and how many are too long.

    Raises:
        OptionsError: the chat template takes no tools, or no conversation fits.
    """
    if not chat_template.takes_tools(tokenizer):
        raise OptionsError(
            "the model's chat template takes no tools: for bfcl-multi-turn take a model whose "
            "template does."
        )
    tokenized = [chat_template.with_calls(tokenizer, x.messages, x.tools) for x in every]
    read = [(ids, spans) for ids, spans in tokenized if len(ids) < longest]
    if not read:
        shortest = min(len(ids) for ids, _ in tokenized)
        raise OptionsError(
            f"--max-model-len {longest} is too short: the shortest conversation takes "
            f"{shortest + 1:,} tokens."
        )
    return read, len(every) - len(read)


@dataclass(frozen=True)
class Score:
    """Of one conversation's calls, joined.

    Attributes:
        logprobs: (tokens,) of each token that the reference has, nats.
        likeliest: (tokens,) the token that the engine holds likeliest there.
        exact: (calls,) whether every token of a call is the likeliest: then the greedy answer,
            given what came before, is that call.
        right: (tokens,) whether the reference's token is the likeliest.
    """

    logprobs: Floats
    likeliest: Ints
    exact: list[bool]
    right: list[bool]


def score(ids: Ints, logprobs: Floats, spans: Sequence[Span]) -> Score:
    """What one reading says about the calls.

    Args:
        ids, logprobs: (tokens - 1, 2), see teacher_forced.Reading.
    """
    # Row i is about token i + 1.
    parts = [slice(first - 1, end - 1) for first, end in spans]
    right = ids[:, 0] == ids[:, 1]
    return Score(
        logprobs=np.concatenate([logprobs[part, 0] for part in parts]),
        likeliest=np.concatenate([ids[part, 1] for part in parts]),
        exact=[bool(right[part].all()) for part in parts],
        right=[bool(x) for part in parts for x in right[part]],
    )


def _scores(
    settings: EngineSettings, tokens: Sequence[Sequence[int]], spans: Sequence[Sequence[Span]]
) -> tuple[list[Score], dict[str, Any]]:
    read = teacher_forced.read(settings, tokens, top=1)
    shares = [teacher_forced.archived_share(chunks, read.policy) for chunks in read.chunks]
    scores = [score(*parts) for parts in zip(read.ids, read.logprobs, spans, strict=True)]
    return scores, {
        "archived_share_of_attended_keys": float(np.mean(shares)),
        "dtype": read.dtype,
    }


def compare(stock: Sequence[Score], other: Sequence[Score], seed: int) -> dict[str, Any]:
    """The results of a record.

    A conversation counts as one, however many calls it has: its tokens depend on each other, and
    so do its calls. The interval resamples conversations.
    """
    pairs = list(zip(stock, other, strict=True))
    change = np.array([b.logprobs.mean() - a.logprobs.mean() for a, b in pairs])
    low, high = statistics.bootstrap_mean(change, seed)
    figures: dict[str, Any] = {}
    for suffix, scores in (("_stock", stock), ("", other)):
        figures[f"logprob{suffix}"] = float(np.mean([one.logprobs.mean() for one in scores]))
        figures[f"token_accuracy{suffix}"] = float(np.mean([x for s in scores for x in s.right]))
        figures[f"exact{suffix}"] = sum(x for one in scores for x in one.exact)
    same = np.concatenate([a.likeliest == b.likeliest for a, b in pairs])
    return {
        "conversations": len(pairs),
        "calls": sum(len(one.exact) for one in stock),
        "tokens": len(same),
        **figures,
        "logprob_change": float(change.mean()),
        "logprob_change_ci95": [low, high],
        "same_likeliest_token": float(same.mean()),
    }


def _rows(record: Record) -> list[list[str]]:
    results: Any = record.results
    low, high = results["logprob_change_ci95"]
    return [
        [
            *stored(record),
            after_and_recent(record),
            results["dtype"],
            f"{results['archived_share_of_attended_keys']:.0%}",
            f"{results['logprob_stock']:.4f}",
            f"{results['logprob_change']:+.4f} ({low:+.4f} to {high:+.4f})",
            f"{results['same_likeliest_token']:.2%}",
            f"{results['exact_stock']:,}",
            f"{results['exact']:,}",
            f"{results['calls']:,}",
            f"{results['conversations']:,}",
        ]
    ]


TABLES = {
    "bfcl-multi-turn": Table(
        [
            *PRESET_HEADS,
            THRESHOLDS_HEAD,
            "dtype",
            "attended keys archived",
            "log-probability of a token, stock (nats)",
            "change (95 % interval)",
            "same likeliest token",
            "calls right, stock",
            "calls right",
            "calls",
            "conversations",
        ],
        _rows,
        "vllm-kvpca evaluate bfcl-multi-turn",
    )
}
