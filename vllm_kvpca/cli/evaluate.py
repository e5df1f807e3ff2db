"""`vllm-kvpca evaluate`: measure the served engine and write records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from vllm_kvpca.lab.record import Record

RECORDS = Path("benchmarks/records")

app = typer.Typer(
    help="Measure the served engine: stock vLLM against presets. Each result becomes a record.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option(help="Model folder or Hub name.")]
Preset = Annotated[list[str], typer.Option(help="Preset to measure; give it once for each.")]
Text = Annotated[
    list[Path],
    typer.Option(help="Text file, or folder with .txt files in it or below; once for each."),
]
Output = Annotated[Path, typer.Option(help="Folder the records are written to.")]
Seed = Annotated[int, typer.Option(help="Of everything that is drawn at random.")]
Eager = Annotated[bool, typer.Option("--eager/--compiled", help="Skip torch.compile.")]
KvGib = Annotated[float, typer.Option(help="Memory of the KV cache, GiB.")]
CompressAfter = Annotated[int, typer.Option(help="Sequences up to this length stay raw, tokens.")]
KeepRecent = Annotated[int, typer.Option(help="Raw tokens at the end of a longer one.")]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float16.")]
MaxModelLen = Annotated[int, typer.Option(help="Longest sequence, tokens.")]
BatchedTokens = Annotated[int, typer.Option(help="Tokens per step, over all requests.")]
Chunk = Annotated[int, typer.Option(min=1, help="Tokens of each sequence per step.")]
AllThresholds = Annotated[
    list[str],
    typer.Option(
        "--thresholds",
        help="compress_after:keep_recent; 0:0 archives every token that it can.",
    ),
]
Through = Annotated[
    str, typer.Option(help="engine; or transformers, for load_preset_cache without vLLM.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep what this command measured from this commit before.")
]


@app.command()
def quality(
    model: Model,
    preset: Preset,
    text: Text,
    tokens: Annotated[int, typer.Option(help="Tokens of text in all.")] = 20_480,
    window: Annotated[int, typer.Option(help="Tokens read as one sequence.")] = 2048,
    chunk: Chunk = 64,
    thresholds: AllThresholds = ["0:0", "512:256"],  # noqa: B006 - typer copies it
    through: Through = "engine",
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
    resume: Resume = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement, teacher-forced, against stock."""
    from vllm_kvpca.lab import against_stock
    from vllm_kvpca.lab.measurements.quality import run

    against_stock.check_through(through)
    kind = "quality" if through == against_stock.ENGINE else f"quality-{through}"
    more: dict[str, Any] = {
        "thresholds": [against_stock.parse_thresholds(pair) for pair in thresholds],
        "through": through,
        "dtype": dtype,
        "kv_gib": kv_gib,
        "eager": eager,
        "seed": seed,
        "done": against_stock.finished(output, kind) if resume else against_stock.nothing_done,
    }
    records = run(model, preset, text, tokens, window, chunk, **more)
    write(
        records,
        output,
        lambda results: (
            f"perplexity {results['perplexity_change']:+.2%}, "
            f"{results['archived_share_of_attended_keys']:.0%} of attended keys archived"
        ),
    )


@app.command()
def identity(
    model: Model,
    text: Text,
    preset: Preset = ["raw"],  # noqa: B006
    dtype: Annotated[list[str], typer.Option(help="Give it once for each.")] = [  # noqa: B006
        "bfloat16",
        "float16",
    ],
    generated: Annotated[int, typer.Option(help="Tokens generated for each prompt.")] = 64,
    kv_gib: KvGib = 2,
    eager: Eager = True,
    seed: Seed = 0,
    output: Output = RECORDS,
) -> None:
    """Greedy answers to 8 prompts of 100 to 3,000 tokens, token by token against stock."""
    from vllm_kvpca.lab.measurements.identity import run

    more: dict[str, Any] = {"kv_gib": kv_gib, "eager": eager, "seed": seed}
    records = run(model, preset, text, dtype, generated, **more)
    write(
        records,
        output,
        lambda results: f"{results['identical_prompts']} of {len(results['prompts'])} identical",
    )


@app.command()
def capacity(
    model: Model,
    preset: Preset,
    kv_gib: KvGib = 1,
    max_model_len: MaxModelLen = 8192,
    compress_after: CompressAfter = 512,
    keep_recent: KeepRecent = 256,
    output: Output = RECORDS,
) -> None:
    """Tokens that fit into the same KV memory, as vLLM reports them, against stock."""
    from vllm_kvpca.lab.measurements.capacity import run

    more = {"compress_after": compress_after, "keep_recent": keep_recent}
    records = run(model, preset, kv_gib, max_model_len, **more)
    write(
        records,
        output,
        lambda results: (
            f"{results['tokens']:,} tokens against {results['tokens_stock']:,}: "
            f"{results['ratio']:.2f}x"
        ),
    )


@app.command()
def chat(
    model: Model,
    preset: Preset,
    question: Annotated[int, typer.Option(help="Tokens of each question.")] = 200,
    answer: Annotated[int, typer.Option(help="Tokens of each answer.")] = 100,
    kv_gib: KvGib = 1,
    compress_after: CompressAfter = 512,
    keep_recent: KeepRecent = 256,
    seed: Seed = 0,
    output: Output = RECORDS,
) -> None:
    """Prompt tokens that the prefix cache spares in a chat of 8 turns, against stock."""
    from vllm_kvpca.lab.measurements.chat import run

    more = {"compress_after": compress_after, "keep_recent": keep_recent, "seed": seed}
    records = run(model, preset, question, answer, kv_gib, **more)
    write(
        records,
        output,
        lambda results: (
            f"{100 * results['reused']:.1f} % reused against {100 * results['reused_stock']:.1f} %"
        ),
    )


@app.command()
def memory(
    model: Model,
    format: Annotated[list[str], typer.Option(help="Format; give it once for each.")] = [  # noqa: B006
        "k8v8",
        "k8v4",
        "k5.5v5.5",
        "k5v4",
    ],
    max_model_len: MaxModelLen = 131_072,
    compress_after: CompressAfter = 512,
    keep_recent: KeepRecent = 256,
    output: Output = RECORDS,
) -> None:
    """KV memory of one sequence over its length, from the page plan; starts no engine."""
    from vllm_kvpca.lab.measurements.memory import run

    record = run(model, format, max_model_len, compress_after, keep_recent)
    results: Any = record.results
    for row in results["formats"]:
        held = row["raw_bytes"][-1] + row["archive_bytes"][-1]
        ratio = results["stock_bytes"][-1] / held
        print(f"{row['format']}: {held / 2**20:,.0f} MiB at {max_model_len:,} tokens, {ratio:.2f}x")
    print(f"  {record.write(output)}")


@app.command()
def throughput(
    model: Model,
    preset: Preset,
    requests: Annotated[int, typer.Option(help="Requests at once.")] = 16,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 1000,
    generated: Annotated[int, typer.Option(help="Tokens generated for each.")] = 128,
    repeats: Annotated[int, typer.Option(help="Runs after the warm-up.")] = 3,
    max_num_batched_tokens: BatchedTokens = 2048,
    max_model_len: MaxModelLen = 8192,
    compress_after: CompressAfter = 512,
    keep_recent: KeepRecent = 256,
    dtype: Dtype = "auto",
    kv_gib: KvGib = 2,
    eager: Eager = False,
    seed: Seed = 0,
    output: Output = RECORDS,
) -> None:
    """Prompt and decode tokens per second of concurrent requests, against stock."""
    from vllm_kvpca.lab.measurements.throughput import run

    more: dict[str, Any] = {
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "compress_after": compress_after,
        "keep_recent": keep_recent,
        "dtype": dtype,
        "kv_gib": kv_gib,
        "eager": eager,
        "seed": seed,
    }
    records = run(model, preset, requests, prompt_tokens, generated, repeats, **more)
    write(
        records,
        output,
        lambda results: (
            f"prompt {results['prompt_ratio']:.2f}x, "
            f"decode {results['decode_ratio']:.2f}x of stock's speed"
        ),
    )


@app.command("block-life")
def block_life(
    model: Model,
    preset: Preset,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 3000,
    generated: Annotated[int, typer.Option(help="Tokens generated.")] = 200,
    max_num_batched_tokens: BatchedTokens = 128,
    max_model_len: MaxModelLen = 8192,
    compress_after: CompressAfter = 512,
    keep_recent: KeepRecent = 256,
    output: Output = RECORDS,
) -> None:
    """Blocks of both cache groups over the life of one request, against stock's."""
    from vllm_kvpca.lab.measurements.block_life import run

    more: dict[str, Any] = {
        "max_num_batched_tokens": max_num_batched_tokens,
        "max_model_len": max_model_len,
        "compress_after": compress_after,
        "keep_recent": keep_recent,
    }
    records = run(model, preset, prompt_tokens, generated, **more)
    write(
        records,
        output,
        lambda results: (
            f"{results['final_mib']:.1f} MiB at the end, stock {results['final_mib_stock']:.1f} MiB"
        ),
    )


def write(records: Iterable[Record], output: Path, summary: Any) -> None:
    """Write each record as soon as it is there, and say in one line what it found."""
    from vllm_kvpca.lab.record import source_state

    source_state()  # the commit that the measurement begins with
    console = Console(soft_wrap=True, highlight=False)
    for record in records:
        path = record.write(output)
        console.print(f"{record.settings['preset']}: {summary(record.results)}")
        console.print(f"  {path}", style="dim", markup=False)
