"""Prompts with facts hidden in them that are asked for at the end, over depth x length.

Two tasks. "needle": sentences hidden in a text ("needle in a haystack"); "recall": the haystack
itself is made of numbered facts, so that each is hidden among others like it (key-value retrieval,
Liu et al., Lost in the Middle, 2023, section 3). Each prompt hides a fact at every depth and asks
for all of them in an order drawn at random (as the multi-query needles of Hsieh et al., RULER,
2024, section 3.1): one reading serves all depths.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import texts

TASKS = ("needle", "recall")
DIGITS = 5
"""Digits of an answer."""
_PLACES = (
    "Paris", "London", "Madrid", "Vienna", "Oslo", "Cairo",
    "Lima", "Tokyo", "Delhi", "Dublin", "Rome", "Berlin",
    "Athens", "Lisbon", "Prague", "Warsaw", "Nairobi", "Havana",
    "Quito", "Seoul", "Hanoi", "Manila", "Sydney", "Boston",
)  # fmt: skip
_ANIMALS = (
    "cat",
    "dog",
    "horse",
    "cow",
    "sheep",
    "goat",
    "pig",
    "duck",
    "hen",
    "fox",
    "wolf",
    "owl",
)

Span = tuple[int, int]
"""First token and end."""

Fact = tuple[list[int], list[int]]
"""Tokens up to the answer, and those of the answer."""


@dataclass(frozen=True)
class Question:
    """Where one fact stands and where it is asked for.

    Attributes:
        depth: 0 for the beginning of the haystack, 1 for its end.
        fact: tokens of the fact in the haystack.
        answer: tokens of the answer behind the question.
    """

    depth: float
    fact: Span
    answer: Span


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the questions in the order in which they are asked."""

    tokens: list[int]
    questions: list[Question]


def make_prompts(
    task: str,
    tokenizer: Any,
    files: Sequence[Path],
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
) -> list[Prompt]:
    """`samples` prompts of each length, in the order of `lengths`.

    Args:
        files: the haystack of "needle"; "recall" makes its own.
        lengths: tokens of a prompt, its questions included; "recall" may fall a fact short.

    Raises:
        OptionsError: an unknown task, a depth outside [0, 1], or prompts too short for the facts.
        CalibrationError: too little text.
    """
    if task not in TASKS:
        raise OptionsError(f"there is no task {task!r}: use {' or '.join(TASKS)}.")
    levels = sorted(set(depths))
    if not 0 < len(levels) <= len(_PLACES) or levels[0] < 0 or levels[-1] > 1:
        raise OptionsError(f"give 1 to {len(_PLACES)} depths from 0 to 1, not {list(depths)}.")
    if len(levels) < len(depths):
        raise OptionsError(f"a depth is given twice: {list(depths)}.")
    writer = _Writer(tokenizer, levels)
    result = []
    for length in lengths:
        if task == "needle":
            hays = texts.windows(tokenizer, files, samples, length)
        for sample in range(samples):
            draw = random.Random(f"{seed} {task} {length} {sample}")
            if task == "needle":
                result.append(writer.needle(hays[sample], draw))
            else:
                result.append(writer.recall(length, draw))
    return result


class _Writer:
    """Puts prompts together from pieces. A piece is tokenized by itself, so that an answer has
    the same tokens in the fact and behind the question."""

    def __init__(self, tokenizer: Any, depths: Sequence[float]) -> None:
        self._tokenizer = tokenizer
        self._depths = depths
        self._start = tokenizer("").input_ids

    def needle(self, hay: list[int], draw: random.Random) -> Prompt:
        """Sentences in a window of text, cut to the window's length."""
        places = draw.sample(_PLACES, len(self._depths))
        facts: list[Fact] = [
            (self._ids(f"\n\nThe secret number of {place} is "), self._number(draw))
            for place in places
        ]
        end = self._ids(".\n")
        written = sum(len(key) + len(value) + len(end) for key, value in facts)
        room = len(hay) - 2 * written - len(self._start)
        _check_room(room, len(hay))
        body = hay[len(self._start) :][:room]
        cuts = [round(depth * room) for depth in self._depths]
        pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, room], strict=True)]
        tokens, places_of = [*self._start], []
        for piece, (key, value) in zip(pieces, [*facts, ([], [])], strict=True):
            tokens += piece
            places_of.append((len(tokens), len(tokens) + len(key) + len(value)))
            tokens += key + value + (end if key else [])
        return self._ask(tokens, facts, places_of[:-1], end, draw)

    def recall(self, length: int, draw: random.Random) -> Prompt:
        """A list of facts of one form, as many as the length holds."""
        end = self._ids("\n")
        every: list[Fact] = []
        keys: set[str] = set()
        size, longest = len(self._start), 0
        while True:
            key = f"{draw.choice(_ANIMALS)} {draw.randrange(100, max(1000, length))}"
            if key in keys:
                continue
            keys.add(key)
            fact = self._ids(f"The number of {key} is "), self._number(draw)
            tokens_of_fact = len(fact[0]) + len(fact[1]) + len(end)
            longest = max(longest, tokens_of_fact)
            if size + tokens_of_fact + longest * len(self._depths) > length:
                break
            every.append(fact)
            size += tokens_of_fact
        chosen = [round(depth * (len(every) - 1)) for depth in self._depths]
        # Each depth needs a fact of its own.
        _check_room(len(set(chosen)) + 1 - len(self._depths), length)
        tokens, places_of = [*self._start], []
        for words, value in every:
            places_of.append((len(tokens), len(tokens) + len(words) + len(value)))
            tokens += words + value + end
        facts, where = [every[i] for i in chosen], [places_of[i] for i in chosen]
        return self._ask(tokens, facts, where, end, draw)

    def _ask(
        self,
        tokens: list[int],
        facts: Sequence[Fact],
        places: Sequence[Span],
        end: list[int],
        draw: random.Random,
    ) -> Prompt:
        order = list(range(len(facts)))
        draw.shuffle(order)
        questions = []
        for i in order:
            key, value = facts[i]
            first = len(tokens) + len(key)
            questions.append(Question(self._depths[i], places[i], (first, first + len(value))))
            tokens = tokens + key + value + end
        return Prompt(tokens, questions)

    def _number(self, draw: random.Random) -> list[int]:
        return self._ids("".join(draw.choice("0123456789") for _ in range(DIGITS)))

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


def _check_room(room: int, length: int) -> None:
    if room < 1:
        raise OptionsError(
            f"prompts of {length} tokens are too short for the facts and their questions: give "
            "longer --length or fewer --depth."
        )
