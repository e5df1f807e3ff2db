"""`vllm-kvpca bench`: speed and capacity on a GPU, as tables on the terminal and records."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvpca.cli.evaluate import RECORDS, MaxModelLen, Output, Seed
from vllm_kvpca.errors import OptionsError

if TYPE_CHECKING:
    from vllm_kvpca.lab.record import Record

MODEL = Path("benchmarks/models/Qwen2.5-7B-shaped")
SHAPES = ["1x32768", "1x131072", "8x32768", "16x16384", "64x4096", "128x2048"]
FORMATS = ["raw", "k8v8", "k8v4", "v-hadamard-mixed"]
ENGINES = ["stock", "stock-fp8", "k8v4"]

Model = Annotated[str, typer.Option(help="Folder with a config.json; weights are not needed.")]
Shapes = Annotated[list[str], typer.Option(help="BATCHxCONTEXT; once for each.")]
Contenders = Annotated[
    list[str],
    typer.Option(
        help="Preset to measure, or calibrated format (with random bases); once for each."
    ),
]
Engines = Annotated[
    list[str],
    typer.Option(help="Engine: stock, stock-fp8, a preset, or a calibrated format; once for each."),
]
KvGib = Annotated[float, typer.Option(help="Memory of the KV cache, GiB.")]

app = typer.Typer(
    help="Speed and capacity on a GPU, against vLLM's own kernels and caches.",
    no_args_is_help=True,
)


@app.command()
def kernels(
    model: Model = str(MODEL),
    shape: Shapes = SHAPES,
    preset: Contenders = FORMATS,
    output: Output = RECORDS,
) -> None:
    """Decode attention: microseconds and GB/s, beside FlashAttention-3 and TurboQuant."""
    from vllm_kvpca.lab.measurements.kernels import run

    record = run(model, [_batch(text) for text in shape], preset)
    path = record.write(output)
    results: Any = record.results
    table = Table("shape", "contender", "B/token-head", "us", "GB/s", "vs FA3 bf16", "of read")
    for row in results["rows"]:
        ratio = row["against_fa3_bf16"]
        table.add_row(
            row["shape"],
            row["contender"],
            f"{row['token_head_bytes']:.0f}",
            f"{row['microseconds']:.1f}",
            f"{row['gigabytes_per_second']:.0f}",
            "-" if ratio is None else f"{ratio:.2f}x",
            f"{row['share_of_read_bandwidth']:.0%}",
        )
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    console.print(f"reading alone: {results['read_gigabytes_per_second']:.0f} GB/s; {path}")


@app.command()
def engine(
    model: Model = str(MODEL),
    preset: Engines = ENGINES,
    kv_gib: KvGib = 10,
    max_model_len: MaxModelLen = 32768,
    seed: Seed = 0,
    output: Output = RECORDS,
) -> None:
    """Tokens that fit, tokens per second and time to the first token of whole engines."""
    from vllm_kvpca.lab.measurements.engine_bench import run

    _write(run(model, preset, kv_gib, max_model_len, seed), output)


@app.command("memory-limited")
def memory_limited(
    model: Model = str(MODEL),
    preset: Engines = ENGINES,
    kv_gib: KvGib = 10,
    max_model_len: MaxModelLen = 32768,
    seed: Seed = 0,
    output: Output = RECORDS,
) -> None:
    """Output tokens per second while far more requests wait than fit the KV cache."""
    from vllm_kvpca.lab.measurements.memory_limited import run

    _write(run(model, preset, kv_gib, max_model_len, seed), output)


def _batch(text: str) -> tuple[int, int]:
    """ "8x32768" to (8, 32768).

    Raises:
        OptionsError: anything else.
    """
    batch, _, context = text.partition("x")
    if not (batch.isdigit() and context.isdigit()):
        raise OptionsError(f"{text!r} is no --shape: write BATCHxCONTEXT, e.g. 8x32768.")
    return int(batch), int(context)


def _write(records: Iterable[Record], output: Path) -> None:
    """Write each record over the one before it, and show how its engines compare."""
    console = Console(soft_wrap=True, highlight=False)
    for record in records:
        path = record.write(output)
        console.print_json(data=record.results["against_stock"])
        console.print(str(path))
