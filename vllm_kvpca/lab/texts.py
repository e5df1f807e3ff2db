"""What engines read: evaluation text as token ids, or random ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vllm_kvpca.calibration.text import find_texts as find_texts  # one reader for all commands
from vllm_kvpca.errors import CalibrationError


def tokenizer_of(model: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def windows(tokenizer: Any, files: Sequence[Path], count: int, length: int) -> list[list[int]]:
    """Token windows spread evenly over the files and within each of them.

    Each window begins with what the tokenizer puts before a text (Gemma's <bos>, or nothing).
    Windows do not overlap.

    Args:
        count: windows in all.
        length: tokens of each.

    Raises:
        CalibrationError: the files hold too little text, with how much is missing.
    """
    start = tokenizer("").input_ids
    size = length - len(start)
    ids = [tokenizer(_read(path), add_special_tokens=False).input_ids for path in files]
    room = [len(tokens) // size for tokens in ids]
    if sum(room) < count:
        raise CalibrationError(
            f"the text holds {sum(room)} windows of {length} tokens and {count} are needed: add "
            f"about {(count - sum(room)) * size:,} tokens of text, or ask for fewer --tokens."
        )
    result = []
    for tokens, wanted in zip(ids, share_out(count, room), strict=True):
        firsts = np.linspace(0, len(tokens) - size, wanted).astype(int) if wanted else ()
        result += [start + tokens[first : first + size] for first in firsts]
    return result


def random_prompts(vocabulary: int, requests: int, length: int, seed: int) -> list[list[int]]:
    """Token ids drawn evenly from the vocabulary: speed does not depend on what they mean."""
    ids = np.random.default_rng(seed).integers(vocabulary, size=(requests, length))
    return [row.tolist() for row in ids]


def vocabulary(model: str) -> int:
    """How many tokens a model knows."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size


def share_out(count: int, room: Sequence[int]) -> list[int]:
    """Divide `count` over places as evenly as their room allows; earlier ones get the remainder."""
    given = [0] * len(room)
    while sum(given) < count:
        for index, most in enumerate(room):
            if given[index] < most and sum(given) < count:
                given[index] += 1
    return given


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
