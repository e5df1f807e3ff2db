"""Berkeley Function Calling Leaderboard (BFCL), single-turn: the right calls of the right tools.

Patil et al., ICML 2025. Answers are judged by the benchmark's match of syntax trees
(lab.tool_match), not by running anything. Categories for Java and JavaScript are not among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import chat_template, presets, right_answers, texts
from vllm_kvpca.lab.against_stock import (
    Done,
    Thresholds,
    nothing_done,
    overlaps_of_texts,
    record_of,
    variants,
)
from vllm_kvpca.lab.benchmark_data import BFCL, data_file, json_lines
from vllm_kvpca.lab.chat_template import Message
from vllm_kvpca.lab.completions import Completion, complete, settings_for
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import THRESHOLDS_HEAD, Table, after_and_recent, one_row, stored
from vllm_kvpca.lab.tool_calls import as_tool, asked_in_words, read_calls
from vllm_kvpca.lab.tool_match import Expected, matches

DEFAULT_CATEGORIES = ("simple_python", "multiple", "parallel", "parallel_multiple")
"""1,000 cases: one tool and one call, several tools, several calls, both."""
CATEGORIES = (
    *DEFAULT_CATEGORIES,
    *("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple"),
)
_FILE = "BFCL_v4_{category}.json"


@dataclass(frozen=True)
class Case:
    """One question.

    Attributes:
        functions: the tools, as the benchmark writes them.
        expected: see tool_match.
    """

    name: str
    category: str
    messages: list[Message]
    functions: list[dict[str, Any]]
    expected: list[Expected]


def run(
    model: str,
    preset_names: Sequence[str],
    categories: Sequence[str] = DEFAULT_CATEGORIES,
    limit: int | None = None,
    most_tokens: int = 512,
    chunk: int = 64,
    thresholds: Sequence[Thresholds] = ((0, 0), (512, 256)),
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "bfcl": one for each preset and pair of thresholds.

    Args:
        limit: cases of each category, from the first; None for all.
        most_tokens: of an answer.
        more: further EngineSettings.
    """
    presets.check(preset_names, model, peers=True)
    files = files_of(categories)
    cases = [case for category in categories for case in load(category)[:limit]]
    asked = (message["content"] for case in cases for message in case.messages)
    seen = overlaps_of_texts(preset_names, asked)
    tokenizer = texts.tokenizer_of(model)
    tools = chat_template.takes_tools(tokenizer)
    prompts = [prompt_of(case, tokenizer, tools) for case in cases]
    common = settings_for(model, prompts, most_tokens, chunk, seed=seed, **more)
    todo = variants(common, preset_names, thresholds, done)
    if not todo:
        return
    stock, dtype = complete(common, prompts, most_tokens)
    chosen = {
        "categories": list(categories),
        "limit": limit,
        "most_tokens": most_tokens,
        "tools_by": "chat template" if tools else "system message",
    }
    slug = [dtype, *([] if tuple(categories) == DEFAULT_CATEGORIES else categories)]
    for settings in todo:
        other, _ = complete(settings, prompts, most_tokens)
        results = compare(cases, stock, other) | {"dtype": dtype}
        used = chosen | {"calibration_overlap": seen[settings.preset]}
        part = f"first-{limit}" if limit else ""
        yield record_of("bfcl", settings, results, used, files, *slug, part)


def files_of(categories: Sequence[str]) -> list[Path]:
    """The files with questions and answers of some categories.

    Raises:
        OptionsError: there is no such category.
        SetupError: the data are not installed.
    """
    if unknown := sorted(set(categories) - set(CATEGORIES)):
        raise OptionsError(
            f"--category {', '.join(unknown)} is not known: use {', '.join(CATEGORIES)}."
        )
    if len(set(categories)) < len(categories):
        raise OptionsError("a category is given twice.")
    names = [_FILE.format(category=category) for category in categories]
    return [data_file(BFCL, name) for one in names for name in (one, f"possible_answer/{one}")]


def load(category: str) -> list[Case]:
    questions, answers = (json_lines(file) for file in files_of([category]))
    expected = {answer["id"]: answer["ground_truth"] for answer in answers}
    return [
        Case(one["id"], category, one["question"][0], one["function"], expected[one["id"]])
        for one in questions
    ]


def prompt_of(case: Case, tokenizer: Any, tools: bool) -> list[int]:
    """Token ids of what the model is given.

    Args:
        tools: whether the chat template takes tools; else a system message lists them.

    Raises:
        OptionsError: the model has no chat template.
    """
    if not chat_template.has_one(tokenizer):
        raise OptionsError(
            "the model has no chat template, and BFCL asks in chats: take a model that has one."
        )
    if tools:
        shown = [as_tool(function) for function in case.functions]
        text = chat_template.render(tokenizer, case.messages, shown)
    else:
        messages = [asked_in_words(case.functions), *case.messages]
        text = chat_template.render(tokenizer, _one_system_message(messages))
    return chat_template.token_ids(tokenizer, text)


def _one_system_message(messages: Sequence[Message]) -> list[Message]:
    """Templates take one at the beginning at most."""
    system = [message["content"] for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    return [{"role": "system", "content": "\n\n".join(system)}, *others]


def compare(
    cases: Sequence[Case], stock: Sequence[Completion], other: Sequence[Completion]
) -> dict[str, Any]:
    """The results of a record: all cases together, then a row for each category."""
    right = [
        [
            matches(read_calls(answer.text), case.functions, case.expected)
            for case, answer in zip(cases, answers, strict=True)
        ]
        for answers in (stock, other)
    ]

    def figures(these: Sequence[int]) -> dict[str, Any]:
        return right_answers.compare(
            [cases[i].name for i in these],
            [stock[i] for i in these],
            [other[i] for i in these],
            [right[0][i] for i in these],
            [right[1][i] for i in these],
        )

    rows = []
    for category in dict.fromkeys(case.category for case in cases):
        of_category = [i for i, case in enumerate(cases) if case.category == category]
        rows.append({"category": category, **figures(of_category)})
    return figures(range(len(cases))) | {"rows": rows}


def _by_category(record: Record) -> list[list[str]]:
    """A line for each category."""
    results: Any = record.results
    return [
        [
            stored(record)[0],
            after_and_recent(record),
            row["category"],
            f"{row['right_stock']}",
            f"{row['right']}",
            f"{row['identical_answers']}",
            f"{row['answers']:,}",
        ]
        for row in results["rows"]
    ]


_COMMAND = "vllm-kvpca evaluate bfcl"
TABLES = {
    "bfcl": Table(right_answers.HEADS, one_row(right_answers.row), _COMMAND),
    "bfcl-categories": Table(
        [
            "preset",
            THRESHOLDS_HEAD,
            "category",
            "right, stock",
            "right",
            "answers identical to stock's",
            "answers",
        ],
        _by_category,
        _COMMAND,
        kind="bfcl",
    ),
}
