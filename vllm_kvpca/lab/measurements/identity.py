"""Whether greedy answers stay the same, token by token, and how near a tie the first change was.

The format `raw` archives without compressing: its answers differ from stock's only where two
tokens are so close that another order of summation decides. vLLM's bfloat16 logits come in steps
of 1/16 to 1/8 at their usual size; float16 is eight times finer. Both are worth a look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvpca.lab import engine
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.progress import steps

PROMPT_TOKENS = (100, 300, 500, 700, 1000, 1500, 2200, 3000)


@dataclass(frozen=True)
class Answer:
    """A greedy answer: its tokens and, at each, log-probability of the likeliest token minus
    that of the second likeliest, nats."""

    tokens: list[int]
    gaps: list[float]


def answer(
    settings: EngineSettings, prompts: Sequence[Sequence[int]], count: int
) -> tuple[list[Answer], str]:
    """Greedy answers of `count` tokens, in a process of its own, and the engine's dtype."""
    return engine.in_process(_answer, settings, prompts, count)


def _answer(
    settings: EngineSettings, prompts: Sequence[Sequence[int]], count: int
) -> tuple[list[Answer], str]:
    llm = engine.start(settings)
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, logprobs=2)
    total = -(-sum(map(len, prompts)) // settings.max_num_batched_tokens) + count - 1
    with steps(f"{settings.preset} {settings.dtype}", total) as step:
        outputs = engine.run(llm, prompts, params, after_step=step)
    answers = [
        Answer(list(output.token_ids), [_gap(position) for position in output.logprobs])
        for output in (request.outputs[0] for request in outputs)
    ]
    return answers, str(llm.llm_engine.model_config.dtype).removeprefix("torch.")


def _gap(position: Any) -> float:
    first, second = sorted((entry.logprob for entry in position.values()), reverse=True)[:2]
    return first - second


def compare(
    stock: Sequence[Answer], other: Sequence[Answer], lengths: Sequence[int]
) -> dict[str, Any]:
    """The results of a record: for each prompt where the answers part, if they do."""
    rows = []
    for length, ours, theirs in zip(lengths, stock, other, strict=True):
        same = identical_tokens(ours.tokens, theirs.tokens)
        parted = same < len(ours.tokens)
        rows.append(
            {
                "prompt_tokens": length,
                "identical_tokens": same,
                "generated_tokens": len(ours.tokens),
                "stock_logprob_gap_nats": ours.gaps[same] if parted else None,
            }
        )
    gaps = [
        row["stock_logprob_gap_nats"] for row in rows if row["stock_logprob_gap_nats"] is not None
    ]
    return {
        "prompts": rows,
        "identical_prompts": len(rows) - len(gaps),
        "largest_gap_nats": max(gaps, default=None),
    }


def identical_tokens(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = enumerate(zip(a, b, strict=True))
    return next((index for index, (x, y) in pairs if x != y), len(a))
