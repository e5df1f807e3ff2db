"""BFCL: from answers to records, and long conversations as one sequence.

The cases are made up, in the shape of the benchmark's.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import chat_template, texts, tool_conversations
from vllm_kvpca.lab.completions import Completion
from vllm_kvpca.lab.docs import tables
from vllm_kvpca.lab.measurements import bfcl, bfcl_multi_turn
from vllm_kvpca.lab.record import load_all

MODEL = str(Path(__file__).parents[2] / "benchmarks" / "models" / "Qwen2.5-7B-shaped")
FUNCTION = {
    "name": "book",
    "description": "Books.",
    "parameters": {
        "type": "dict",
        "required": ["city"],
        "properties": {"city": {"type": "string"}},
    },
}
ANSWER = '<tool_call>\n{{"name": "book", "arguments": {{"city": "{city}"}}}}\n</tool_call>'


CASES = {
    category: [
        {
            "id": f"{category}_{n}",
            "question": [[{"role": "user", "content": f"Book {n}"}]],
            "function": [FUNCTION],
        }
        for n in range(2)
    ]
    for category in ("multiple", "parallel")
}


@pytest.fixture
def cases(package):
    files = {}
    for category, questions in CASES.items():
        name = f"BFCL_v4_{category}.json"
        files[f"data/{name}"] = questions
        files[f"data/possible_answer/{name}"] = [
            {"id": one["id"], "ground_truth": [{"book": {"city": ["NYC", "New York"]}}]}
            for one in questions
        ]
    package("bfcl_eval", files)


@pytest.mark.parametrize("tools", [True, False])
def test_the_command_writes_records_that_the_tables_show(
    cases, chat_tokenizer, tmp_path, monkeypatch, tools
):
    asked = []

    def answers(settings, prompts, most):
        asked.append((settings.preset, [chat_tokenizer.decode(one) for one in prompts]))
        wrong = settings.preset == "k8v4"
        cities = ["NYC", "NYC", "NYC", "Boston" if wrong else "new york"]
        texts = [ANSWER.format(city=city) for city in cities]
        return [Completion(list(text.encode()), text, False) for text in texts], "float16"

    if not tools:
        without = chat_tokenizer.chat_template.partition("{%- for message")
        monkeypatch.setattr(chat_tokenizer, "chat_template", without[1] + without[2])
    monkeypatch.setattr(bfcl, "complete", answers)
    monkeypatch.setattr(texts, "tokenizer_of", lambda model: chat_tokenizer)
    words = ["--category", "multiple", "--category", "parallel", "--thresholds", "0:0"]
    words += ["--model", MODEL, "--preset", "raw", "--preset", "k8v4", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, ["evaluate", "bfcl", *words])
    assert result.exit_code == 0, result.output
    assert "k8v4: 3 of 4 right, stock 4; 3 answers identical" in result.output
    assert [preset for preset, _ in asked] == ["stock", "raw", "k8v4"]
    first = asked[0][1][0]
    assert '"book"' in first and '"object"' in first and "Book 0" in first
    assert first.count("<|im_start|>system") == 1

    records = load_all(tmp_path, "bfcl")
    assert [record.settings["preset"] for record in records] == ["k8v4", "raw"]
    assert records[0].settings["tools_by"] == ("chat template" if tools else "system message")
    assert records[0].results["only_stock_right"] == ["parallel_1"]
    assert len(records[0].texts) == 4
    assert "| 4 (100.0%) | 3 (75.0%) | -25.0% (" in tables.table("bfcl", records)
    rows = [x for x in tables.table("bfcl-categories", records).splitlines() if "k8v4" in x]
    assert "| 0 / 0 | multiple | 2 | 2 | 2 | 2 |" in rows[0]
    assert "| 0 / 0 | parallel | 2 | 1 | 1 | 2 |" in rows[1]


def test_unknown_categories_and_models_without_chat_are_refused(cases, chat_tokenizer, monkeypatch):
    with pytest.raises(OptionsError, match="--category simple_java is not known"):
        bfcl.files_of(["multiple", "simple_java"])
    with pytest.raises(OptionsError, match="twice"):
        bfcl.files_of(["multiple", "multiple"])
    monkeypatch.setattr(chat_tokenizer, "chat_template", None)
    with pytest.raises(OptionsError, match="no chat template"):
        bfcl.prompt_of(bfcl.load("multiple")[0], chat_tokenizer, tools=False)


SERVICE = """
class MathAPI:
    def __init__(self):
        self.calls = 0

    def add(self, a, b):
        self.calls += 1
        return {"sum": a + b, "calls": self.calls}


class TicketAPI:
    def _load_scenario(self, scenario, long_context=False):
        self.text = scenario["text"] * (1000 if long_context else 1)

    def read(self, name, lines=1):
        if name != "a.txt":
            raise ValueError("no such file")
        return self.text
"""


@pytest.fixture
def conversation(package):
    """One case with two turns: two calls, one of them failing, then a call of long content."""
    case = {
        "id": "multi_turn_long_context_0",
        "question": [[{"role": "user", "content": content}] for content in ("Add.", "Read.")],
        "initial_config": {"TicketAPI": {"text": "abc"}},
        "involved_classes": ["TicketAPI", "MathAPI"],
        "excluded_function": ["gone"],
    }
    answer = {
        "id": case["id"],
        "ground_truth": [["add(1, b=2)", "read('b.txt')"], ["read('a.txt')"]],
    }
    name = f"BFCL_v4_{tool_conversations.CATEGORY}.json"
    tool = {"description": "", "parameters": {"type": "dict", "properties": {}}}
    files = {f"data/{name}": [case], f"data/possible_answer/{name}": [answer]}
    for file in tool_conversations._SERVICES.values():
        files[f"data/multi_turn_func_doc/{file}.json"] = [{"name": "gone"} | tool]
    files["data/multi_turn_func_doc/math_api.json"] = [{"name": "add"} | tool]
    code = tool_conversations._CODE.replace(".", "/").removeprefix("bfcl_eval/")
    parts = code.split("/")
    files |= {f"{'/'.join(parts[: n + 1])}/__init__.py": "" for n in range(len(parts))}
    files |= {f"{code}/math_api.py": SERVICE, f"{code}/ticket_api.py": SERVICE}
    package("bfcl_eval_made", files)


@pytest.fixture
def as_installed(conversation, monkeypatch):
    """An installed bfcl_eval may be imported already: the made-up one has a name of its own."""
    made = tool_conversations.BFCL.__class__("bfcl_eval_made", "x")
    monkeypatch.setattr(tool_conversations, "BFCL", made)
    monkeypatch.setattr(
        tool_conversations, "_CODE", tool_conversations._CODE.replace("bfcl_eval", "bfcl_eval_made")
    )


def test_a_conversation_holds_what_the_calls_gave_back(as_installed):
    [one] = tool_conversations.load()
    assert [tool["function"]["name"] for tool in one.tools] == ["add"]
    roles = [message["role"] for message in one.messages]
    assert roles == ["user", *["assistant", "tool"] * 2, "user", "assistant", "tool"]
    calls = [m["tool_calls"][0]["function"] for m in one.messages if m["role"] == "assistant"]
    assert calls[0] == {"name": "add", "arguments": {"a": 1, "b": 2}}  # names, where left out
    results = [m["content"] for m in one.messages if m["role"] == "tool"]
    assert results[:2] == ['{"sum": 3, "calls": 1}', "Error during execution: no such file"]
    assert results[2] == "abc" * 1000


def test_calls_are_found_in_the_tokens_of_a_conversation(as_installed, chat_tokenizer):
    [one] = tool_conversations.load()
    ids, spans = chat_template.with_calls(chat_tokenizer, one.messages, one.tools)
    text = chat_template.render(chat_tokenizer, one.messages, one.tools, begun=False)
    assert chat_tokenizer.decode(ids) == text
    found = [chat_tokenizer.decode(ids[first:end]) for first, end in spans]
    assert found == [
        'add", "arguments": {"a": 1, "b": 2',
        'read", "arguments": {"name": "b.txt"',
        'read", "arguments": {"name": "a.txt"',
    ]


def test_a_template_that_rewrites_the_past_is_refused(as_installed, chat_tokenizer, monkeypatch):
    [one] = tool_conversations.load()
    changing = "{{- messages | length }}" + chat_tokenizer.chat_template
    monkeypatch.setattr(chat_tokenizer, "chat_template", changing)
    with pytest.raises(OptionsError, match="rewrites earlier messages"):
        chat_template.with_calls(chat_tokenizer, one.messages, one.tools)


def test_too_short_a_length_and_templates_without_tools_are_refused(
    as_installed, chat_tokenizer, monkeypatch
):
    every = tool_conversations.load()
    read, left_out = bfcl_multi_turn.prompts(chat_tokenizer, every, 100_000)
    assert (len(read), left_out) == (1, 0)
    with pytest.raises(OptionsError, match="--max-model-len 3000 is too short"):
        bfcl_multi_turn.prompts(chat_tokenizer, every, 3000)
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ messages[0].content }}")
    with pytest.raises(OptionsError, match="takes no tools"):
        bfcl_multi_turn.prompts(chat_tokenizer, every, 100_000)


def test_a_call_is_right_if_all_its_tokens_are_the_likeliest(make):
    # A prompt of 6 tokens: rows are about tokens 1 to 5; the calls are tokens 1-2 and 4-5.
    ids = np.array([[7, 7], [8, 8], [1, 2], [9, 9], [5, 6]])
    logprobs = np.log([[0.5, 0.5], [0.25, 0.25], [0.1, 0.9], [0.5, 0.5], [0.25, 0.75]])
    stock = bfcl_multi_turn.score(ids, logprobs, [(1, 3), (4, 6)])
    assert (stock.exact, stock.right) == ([True, False], [True, True, True, False])
    assert np.exp(stock.logprobs) == pytest.approx([0.5, 0.25, 0.5, 0.25])
    worse = bfcl_multi_turn.score(np.array([[7, 3], *ids[1:]]), logprobs - 0.125, [(1, 3), (4, 6)])
    results = bfcl_multi_turn.compare([stock, stock], [worse, stock], seed=0)
    assert results["logprob_change"] == pytest.approx(-0.0625)
    assert (results["exact_stock"], results["exact"], results["calls"]) == (2, 1, 4)
    assert results["same_likeliest_token"] == 7 / 8
    json.dumps(results, allow_nan=False)
    facts = {"archived_share_of_attended_keys": 0.94, "dtype": "float16"}
    record = make(kind="bfcl-multi-turn", results=results | facts)
    row = next(x for x in tables.table("bfcl-multi-turn", [record]).splitlines() if "k8v4" in x)
    assert "| 94% | -1.0397 | -0.0625 (-0.1250 to +0.0000) | 87.50% | 2 | 1 | 4 | 2 |" in row
