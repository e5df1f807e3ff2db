"""`vllm-kvpca evaluate needle | recall | divergence | tasks`: what compression does to answers."""

from __future__ import annotations

from pathlib import Path
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
    Text,
    Through,
    write,
)

Length = Annotated[
    list[int], typer.Option(min=1, help="Tokens of a prompt; give it once for each.")
]
Depth = Annotated[
    list[float],
    typer.Option(min=0, max=1, help="Where facts stand, 0 to 1; give it once for each."),
]
Samples = Annotated[int, typer.Option(min=1, help="Prompts of each length.")]
LENGTHS = [512, 1024, 2048, 4096]
DEPTHS = [0.0, 0.25, 0.5, 0.75, 1.0]


def needle(
    model: Model,
    preset: Preset,
    text: Text,
    length: Length = LENGTHS,
    depth: Depth = DEPTHS,
    samples: Samples = 8,
    chunk: Chunk = 64,
    thresholds: AllThresholds = ["0:0"],  # noqa: B006 - typer copies it
    through: Through = "engine",
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
    resume: Resume = False,
) -> None:
    """Facts hidden in a text and asked for at its end (needle in a haystack), against stock."""
    more = {"dtype": dtype, "kv_gib": kv_gib, "eager": eager}
    chosen = {"lengths": length, "depths": depth, "samples": samples, "chunk": chunk, "seed": seed}
    _facts("needle", model, preset, text, through, thresholds, resume, output, **chosen, **more)


def recall(
    model: Model,
    preset: Preset,
    length: Length = LENGTHS,
    depth: Depth = DEPTHS,
    samples: Samples = 8,
    chunk: Chunk = 64,
    thresholds: AllThresholds = ["0:0"],  # noqa: B006 - typer copies it
    through: Through = "engine",
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
    resume: Resume = False,
) -> None:
    """Values by key from a long list of facts, over depth and length, against stock."""
    more = {"dtype": dtype, "kv_gib": kv_gib, "eager": eager}
    chosen = {"lengths": length, "depths": depth, "samples": samples, "chunk": chunk, "seed": seed}
    _facts("recall", model, preset, [], through, thresholds, resume, output, **chosen, **more)


def _facts(
    task: str,
    model: str,
    preset: list[str],
    text: list[Path],
    through: str,
    thresholds: list[str],
    resume: bool,
    output: Path,
    **chosen: Any,
) -> None:
    from vllm_kvpca.lab import against_stock
    from vllm_kvpca.lab.measurements.needle import run

    against_stock.check_through(through)
    chosen |= common(thresholds, resume, output, task)
    records = run(task, model, preset, text, through=through, **chosen)
    write(
        records,
        output,
        lambda found: (
            f"{found['exact']:.0%} of answers right, stock {found['exact_stock']:.0%}; "
            f"log-probability {found['logprob_change']:+.4f} nats a token"
        ),
    )


def divergence(
    model: Model,
    preset: Preset,
    text: Text,
    prompts: Annotated[int, typer.Option(min=1, help="Prompts, from the text.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 1024,
    generated: Annotated[int, typer.Option(min=1, help="Tokens generated for each.")] = 128,
    thresholds: AllThresholds = ["0:0", "512:256"],  # noqa: B006 - typer copies it
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
    resume: Resume = False,
) -> None:
    """Tokens until greedy answers part from stock's, and how near a tie it was."""
    from vllm_kvpca.lab.measurements.divergence import run

    more: dict[str, Any] = {"dtype": dtype, "kv_gib": kv_gib, "eager": eager, "seed": seed}
    more |= common(thresholds, resume, output, "divergence")
    records = run(model, preset, text, prompts, prompt_tokens, generated, **more)
    write(
        records,
        output,
        lambda found: (
            f"median {found['same_tokens_quartiles'][1]:g} of {found['generated_tokens']} tokens, "
            f"{found['never_parted']:.0%} never part"
        ),
    )


def tasks(
    model: Model,
    preset: Preset,
    tasks: Annotated[str, typer.Option(help="Names of lm-eval's tasks, joined by commas.")],
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own (YAML).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in a prompt.")] = None,
    chunk: Chunk = 64,
    thresholds: AllThresholds = ["0:0"],  # noqa: B006 - typer copies it
    max_model_len: MaxModelLen = 2048,
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
    resume: Resume = False,
) -> None:
    """Benchmarks of lm-eval (extra `lab`) on the served engine."""
    from vllm_kvpca.lab.measurements.tasks import Chosen, run

    names = tuple(name.strip() for name in tasks.split(",") if name.strip())
    chosen = Chosen(tasks=names, include_path=include_path, limit=limit, num_fewshot=num_fewshot)
    more: dict[str, Any] = {
        "max_model_len": max_model_len,
        "dtype": dtype,
        "kv_gib": kv_gib,
        "eager": eager,
        "seed": seed,
    }
    more |= common(thresholds, resume, output, "tasks")
    records = run(model, preset, chosen, chunk, **more)
    write(
        records,
        output,
        lambda found: "; ".join(
            f"{row['task']} {row['metric']} {row['preset']:.4g}, stock {row['stock']:.4g}"
            for row in found["rows"]
        ),
    )


def common(thresholds: list[str], resume: bool, output: Path, kind: str) -> dict[str, Any]:
    """What every measurement of pairs of thresholds is given."""
    from vllm_kvpca.lab import against_stock

    return {
        "thresholds": [against_stock.parse_thresholds(pair) for pair in thresholds],
        "done": against_stock.finished(output, kind) if resume else against_stock.nothing_done,
    }
