"""How much of a chat's prompts the prefix cache spares, turn by turn.

Every prompt is the whole chat so far and a new question, so nearly all of it was computed
before. What is found depends on how prefixes are kept, not on what is said: weights and
questions are random.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vllm_kvpca.lab import engine, presets
from vllm_kvpca.lab.against_stock import record_of
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import PRESET_HEADS, Table, one_row, stored

TURNS = 8
STOCK_BLOCK = 16 if torch.cuda.is_available() else 32
"""Tokens per block of the stock engine: a GPU's default, and the least that a CPU takes."""


def run(
    model: str,
    preset_names: Sequence[str],
    question: int = 200,
    answer: int = 100,
    kv_gib: float = 1,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "chat": one for each preset.

    Args:
        question, answer: tokens of each.
    """
    presets.check(preset_names, model)
    longest = TURNS * (question + answer) + 64
    common = EngineSettings(model=model, max_model_len=longest, kv_gib=kv_gib, **more)
    chosen = {"question": question, "answer": answer, "turns": TURNS}
    stock = measure(common, question, answer)
    for name in preset_names:
        settings = common.model_copy(update={"preset": name})
        results = compare(stock, measure(settings, question, answer))
        yield record_of("chat", settings, results, chosen)


def measure(settings: EngineSettings, question: int, answer: int) -> dict[str, list[int]]:
    """One chat, in a process of its own.

    Returns:
        prompts, reused: tokens of each turn's prompt, and those that were found in the cache.
    """
    return engine.in_process(_measure, settings, question, answer)


def _measure(settings: EngineSettings, question: int, answer: int) -> dict[str, list[int]]:
    more: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True}
    if settings.preset == engine.STOCK:
        more["block_size"] = STOCK_BLOCK
    llm = engine.start(settings, enable_prefix_caching=True, **more)
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, ignore_eos=True, max_tokens=answer, detokenize=False)
    rng = random.Random(settings.seed)
    text: list[int] = []
    prompts: list[int] = []
    reused: list[int] = []
    for _ in range(TURNS):
        text = text + [rng.randrange(1, 1000) for _ in range(question)]
        (output,) = llm.generate([{"prompt_token_ids": text}], sampling, use_tqdm=False)
        prompts.append(len(text))
        reused.append(output.num_cached_tokens)
        text = text + list(output.outputs[0].token_ids)
    return {"prompts": prompts, "reused": reused}


def compare(stock: dict[str, list[int]], other: dict[str, list[int]]) -> dict[str, Any]:
    """The results of a record: shares of all prompt tokens."""
    return {
        "prompt_tokens": other["prompts"],
        "reused_tokens_stock": stock["reused"],
        "reused_tokens": other["reused"],
        "reused_stock": sum(stock["reused"]) / sum(stock["prompts"]),
        "reused": sum(other["reused"]) / sum(other["prompts"]),
    }


def _row(record: Record) -> list[str]:
    results: Any = record.results
    settings: Any = record.settings
    behind = [
        a - b for a, b in zip(results["reused_tokens_stock"], results["reused_tokens"], strict=True)
    ]
    return [
        *stored(record),
        f"{settings['turns']} x ({settings['question']} + {settings['answer']})",
        f"{100 * results['reused_stock']:.1f} %",
        f"{100 * results['reused']:.1f} %",
        f"{max(behind):,}",
    ]


TABLES = {
    "chat": Table(
        [
            *PRESET_HEADS,
            "turns x (question + answer), tokens",
            "prompt tokens reused, stock",
            "reused",
            "most tokens behind stock in a turn",
        ],
        one_row(_row),
        "vllm-kvpca evaluate chat",
    )
}
