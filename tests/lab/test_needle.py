"""Hidden facts: prompts that hold what they ask for, and scores against plain definitions."""

from __future__ import annotations

import numpy as np
import pytest

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import hidden_facts
from vllm_kvpca.lab.hidden_facts import Prompt, Question
from vllm_kvpca.lab.measurements import needle
from vllm_kvpca.pages.boundary import Policy

DEPTHS = [1.0, 0.0, 0.5]


class Letters:
    """A tokenizer: one token per character, and a first token for every text."""

    def __call__(self, text, add_special_tokens=True):
        self.input_ids = [0] * add_special_tokens + [ord(letter) for letter in text]
        return self


def read(prompt, span):
    return "".join(map(chr, prompt.tokens[slice(*span)]))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} of a dull story. " for i in range(1000)))
    return [path]


@pytest.fixture(params=hidden_facts.TASKS)
def prompts(request, text):
    return hidden_facts.make_prompts(request.param, Letters(), text, [600, 900], DEPTHS, 3, seed=1)


def test_every_question_asks_for_its_fact(prompts):
    assert len(prompts) == 6
    for prompt, length in zip(prompts, [600] * 3 + [900] * 3, strict=True):
        assert length - 40 < len(prompt.tokens) <= length
        assert prompt.tokens[0] == 0 and 0 not in prompt.tokens[1:]
        first_question = min(q.answer[0] for q in prompt.questions)
        for question in prompt.questions:
            fact, answer = read(prompt, question.fact), read(prompt, question.answer)
            assert answer.isdigit() and len(answer) == hidden_facts.DIGITS
            assert fact.endswith(f" is {answer}")
            asked = question.answer[0] - len(fact) + len(answer), question.answer[1]
            assert read(prompt, asked) == fact
            assert question.fact[1] < first_question
            # The fact occurs in the haystack once.
            whole = read(prompt, (1, len(prompt.tokens)))
            assert whole.count(fact) == 2


def test_facts_stand_where_they_should(prompts):
    for prompt in prompts:
        by_depth = sorted(prompt.questions, key=lambda q: q.depth)
        assert [q.depth for q in by_depth] == sorted(DEPTHS)
        end = by_depth[-1].fact[1]
        assert by_depth[0].fact[0] == 1
        middle = by_depth[1].fact
        assert abs((middle[0] + middle[1]) / 2 - end / 2) < 40
        assert end + 2 >= min(q.answer[0] for q in prompt.questions) - 40


def test_prompts_are_drawn_anew_and_repeatable(text):
    make = lambda seed: hidden_facts.make_prompts("needle", Letters(), text, [600], DEPTHS, 4, seed)  # noqa: E731
    first, second = make(1), make(2)
    assert make(1) == first
    assert first != second
    assert len({tuple(q.depth for q in prompt.questions) for prompt in first + second}) > 1


@pytest.mark.parametrize(
    ("task", "lengths", "depths", "words"),
    [
        ("haystack", [600], [0.5], "needle or recall"),
        ("needle", [600], [1.5], "from 0 to 1"),
        ("recall", [600], [], "1 to 24 depths"),
        ("recall", [600], [0.5, 0.5], "given twice"),
        ("needle", [100], [0.0, 0.5], "too short"),
        ("recall", [100], [0.0, 0.5], "too short"),
    ],
)
def test_what_makes_no_sense_is_refused(text, task, lengths, depths, words):
    with pytest.raises(OptionsError, match=words):
        hidden_facts.make_prompts(task, Letters(), text, lengths, depths, 1, 0)


def test_a_score_looks_at_the_answers_tokens_alone():
    tokens = list(range(50))
    questions = [Question(1.0, (20, 28), (40, 43)), Question(0.0, (0, 8), (45, 47))]
    logprobs, likeliest = -np.arange(1.0, 50), np.zeros(49, bool)
    likeliest[[39, 40, 44, 45]] = True  # position i predicts token i + 1
    # Steps of 10: token 39 is in the fourth, which sees boundary(30) = 24; token 44 in the fifth.
    found = needle.score(Prompt(tokens, questions), logprobs, likeliest, [10] * 5, Policy(6, 6, 8))
    assert found.right.tolist() == pytest.approx([1, 2 / 3])
    assert found.logprob.tolist() == pytest.approx([-45.5, -41])
    assert found.archived.tolist() == [1, 0.5]
    stock = needle.score(Prompt(tokens, questions), logprobs, likeliest, [10] * 5, None)
    assert stock.archived.tolist() == [0, 0]


def test_cells_and_sums():
    rng = np.random.default_rng(0)
    lengths, depths, samples = [10, 20], [0.0, 0.5, 1.0], 4

    def scores(shift):
        return [
            needle.Score(rng.integers(0, 3, 3) / 2, rng.normal(shift, 1, 3), np.full(3, 0.25))
            for _ in range(len(lengths) * samples)
        ]

    stock, other = scores(0), scores(-1)
    results = needle.compare(stock, other, lengths, depths, seed=0)
    cell = results["cells"][4]  # length 20, depth 0.5
    assert (cell["length_tokens"], cell["depth"], cell["answers"]) == (20, 0.5, samples)
    assert cell["exact"] == sum(s.right[1] == 1 for s in other[4:]) / 4
    assert cell["token_accuracy_stock"] == pytest.approx(sum(s.right[1] for s in stock[4:]) / 4)
    changes = [b.logprob[1] - a.logprob[1] for a, b in zip(stock[4:], other[4:], strict=True)]
    assert cell["logprob_change"] == pytest.approx(sum(changes) / 4)
    assert cell["archived_share"] == 0.25
    assert results["answers"] == 24
    low, high = results["logprob_change_ci95"]
    assert low < results["logprob_change"] < high
    same = needle.compare(stock, stock, lengths, depths, seed=0)
    assert same["logprob_change_ci95"] == [0, 0] and same["exact"] == same["exact_stock"]
