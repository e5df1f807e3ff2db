"""`vllm-kvpca bench`: speed and capacity on a GPU, as tables on the terminal and records."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvpca.cli.evaluate import RECORDS, MaxModelLen, Output, Seed
from vllm_kvpca.errors import OptionsError

if TYPE_CHECKING:
    from vllm_kvpca.lab.engine import EngineSettings

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
    _need_gpu()
    from transformers import AutoConfig

    from vllm_kvpca.lab.measurements import kernels as decode_bench
    from vllm_kvpca.lab.presets import head_dim
    from vllm_kvpca.lab.record import make_record

    config = AutoConfig.from_pretrained(model).get_text_config()
    heads = (config.num_attention_heads, config.num_key_value_heads, head_dim(model))
    bandwidth = decode_bench.read_bandwidth()
    rows = []
    for text in shape:
        batch, _, context = text.partition("x")
        chosen = decode_bench.Shape(int(batch), int(context), *heads)
        ours = [name + part for name in preset for part in ("", decode_bench.ALL_ARCHIVED)]
        rows += list(decode_bench.measure(chosen, [*decode_bench.PEERS, *ours]))
    results = decode_bench.compare(rows, bandwidth)
    settings: dict[str, Any] = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
    record = make_record("kernels", [], model, settings, results, seed=0)
    path = record.write(output)
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
    console.print(f"reading alone: {bandwidth:.0f} GB/s; {path}")


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
    _need_gpu()
    from vllm_kvpca.lab.measurements import engine_bench

    settings = _engine_settings(model, kv_gib, max_model_len, seed)
    for measured in engine_bench.run(settings, preset):
        results = engine_bench.compare(measured)
        _write_engines("engine", settings, results, output)


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
    _need_gpu()
    from vllm_kvpca.lab.measurements import engine_bench

    settings = _engine_settings(model, kv_gib, max_model_len, seed)
    for measured in engine_bench.run(settings, preset, engine_bench.measure_memory_short):
        results = engine_bench.compare_memory_short(measured)
        _write_engines("memory-limited", settings, results, output)


def _engine_settings(model: str, kv_gib: float, max_model_len: int, seed: int) -> EngineSettings:
    from vllm_kvpca.lab.engine import EngineSettings

    return EngineSettings(
        model=model,
        max_model_len=max_model_len,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        kv_gib=kv_gib,
        eager=False,
        seed=seed,
    )


def _write_engines(
    kind: str, settings: EngineSettings, results: dict[str, Any], output: Path
) -> None:
    """After each engine anew, so that a run that is cut short leaves a record of the others."""
    from vllm_kvpca.lab.record import make_record

    chosen = settings.model_dump(exclude={"model", "seed", "preset"})
    record = make_record(kind, ["bench"], settings.model, chosen, results, seed=settings.seed)
    path = record.write(output)
    console = Console(soft_wrap=True, highlight=False)
    console.print_json(data=results["against_stock"])
    console.print(str(path))


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise OptionsError("vllm-kvpca bench measures on an NVIDIA GPU, and there is none here.")
