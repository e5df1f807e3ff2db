"""Whether greedy answers stay the same, token by token, and how near a tie the first change was.

The format `raw` archives without compressing: its answers differ from stock's only where two
tokens are so close that another order of summation decides. vLLM's bfloat16 logits come in steps
of 1/16 to 1/8 at their usual size; float16 is eight times finer. Both are worth a look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvpca.lab import engine, presets, texts
from vllm_kvpca.lab.against_stock import record_of
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.progress import steps
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import PRESET_HEADS, Table, one_row, stored

PROMPT_TOKENS = (100, 300, 500, 700, 1000, 1500, 2200, 3000)


def run(
    model: str,
    preset_names: Sequence[str],
    text: Sequence[Path],
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    generated: int = 64,
    seed: int = 0,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "identity": one for each dtype and preset, and a control for each dtype.

    The control is stock against stock with steps of half as many tokens: how often answers part
    for no other reason than the order of summation.
    """
    presets.check(preset_names, model)
    files = texts.find_texts(text)
    lengths = PROMPT_TOKENS
    longest = max(lengths)
    windows = texts.windows(texts.tokenizer_of(model), files, len(lengths), longest)
    prompts = [window[:length] for window, length in zip(windows, lengths, strict=True)]
    for dtype in dtypes:
        common = EngineSettings(
            model=model, dtype=dtype, max_model_len=longest + generated, seed=seed, **more
        )
        stock, resolved = answer(common, prompts, generated)
        control: dict[str, Any] = {"max_num_batched_tokens": common.max_num_batched_tokens // 2}
        for changes in [control, *({"preset": name} for name in preset_names)]:
            settings = common.model_copy(update=changes)
            other, _ = answer(settings, prompts, generated)
            results = compare(stock, other, lengths) | {"dtype": resolved}
            yield record_of("identity", settings, results, {}, files, resolved)


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


def _row(record: Record) -> list[str]:
    results: Any = record.results
    rows = results["prompts"]
    gap = results["largest_gap_nats"]
    same = sum(row["identical_tokens"] for row in rows)
    return [
        *stored(record),
        results["dtype"],
        f"{results['identical_prompts']} of {len(rows)}",
        f"{same} of {sum(row['generated_tokens'] for row in rows)}",
        "none parted" if gap is None else f"{gap:.3f}",
    ]


TABLES = {
    "identity": Table(
        [
            *PRESET_HEADS,
            "dtype",
            "identical answers",
            "identical tokens",
            "largest gap at a first difference (nats)",
        ],
        one_row(_row),
        "vllm-kvpca evaluate identity",
    )
}
