"""`vllm-kvpca calibrate`: presets for one model, from text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvpca.errors import OptionsError

if TYPE_CHECKING:
    from vllm_kvpca.calibration.card import Source
    from vllm_kvpca.calibration.collect import AttentionShape, Moments
    from vllm_kvpca.codec.key_bias import KeyBias

CONTEXT_HELP = (
    "Positions over which windows begin, so that bases fit long contexts; by default all of the "
    "model's. 0: all begin at the first."
)
QUANTIZED_HELP = (
    "How the weights were quantized before they were unpacked, e.g. Q4_K_M: the preset then serves "
    "the original's weights too, with a warning."
)
TEXT_HELP = "Text file, or folder with .txt files in it or below; more may follow it: --text a b c."


def calibrate(
    model: Annotated[str, typer.Option(help="Model folder or Hub name.")],
    format: Annotated[
        list[str],
        typer.Option(
            help="Format to fit, e.g. k5.5v5.5 or v-mixed; several from one pass over the text: "
            "give it once for each."
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(help="Folder of the new preset; of several formats OUTPUT/FORMAT for each."),
    ],
    text: Annotated[list[Path] | None, typer.Option(help=TEXT_HELP)] = None,
    more_text: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            help="Dataset of the Hub, e.g. NAME or NAME@CONFIG:SPLIT:COLUMN; once for each."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run, at most.")] = 100_000,
    window: Annotated[int, typer.Option(min=16, help="Tokens of one sequence.")] = 2048,
    context: Annotated[int | None, typer.Option(min=0, help=CONTEXT_HELP)] = None,
    seed: Annotated[int, typer.Option(help="Order in which the files take turns.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="The model's Hub name org/name; by default from --model.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; by default a GPU if any.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, ...; by default float32 on CPUs.")
    ] = "auto",
    note: Annotated[str, typer.Option(help="A sentence for the preset's card.")] = "",
    quantized: Annotated[str, typer.Option(help=QUANTIZED_HELP)] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace presets.")] = False,
    records: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the record, by default the preset's own; of several formats "
            "RECORDS/FORMAT for each."
        ),
    ] = None,
) -> None:
    """Fit the bases of formats to a model and write a preset folder for each.

    The text is read once, however many formats there are.
    """
    from vllm_kvpca.calibration import output as outputs
    from vllm_kvpca.calibration import overlap, resume
    from vllm_kvpca.calibration.card import source_of_now
    from vllm_kvpca.calibration.collect import attention_shape, positions_of
    from vllm_kvpca.calibration.fit import check_format, preset_config, wanted
    from vllm_kvpca.calibration.key_bias import key_biases
    from vllm_kvpca.calibration.network import load, name_of, samples_of
    from vllm_kvpca.calibration.report import spread
    from vllm_kvpca.calibration.text import find_texts
    from vllm_kvpca.lab.record import make_record

    formats = list(dict.fromkeys(format))
    for one in formats:
        check_format(one)
    folders = outputs.folders(output, formats)
    outputs.check(output, folders.values(), overwrite)
    files = find_texts(_texts([*(text or []), *(more_text or [])], dataset or [], tokens))
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        tokenizer, network = load(model, device, dtype)
        shape = attention_shape(network)
    revision = getattr(network.config, "_commit_hash", None)
    made_for = name or name_of(model)
    biases = key_biases(network, shape)
    configs = {one: preset_config(one, made_for, revision, shape, bool(biases)) for one in formats}
    dtype = str(network.dtype).removeprefix("torch.")
    context = positions_of(network) if context is None else context
    source = source_of_now(files, tokens, window, seed, dtype, note, context)
    # K and V both, whatever the formats need: the report shows what another one would gain.
    which = {"k", "v"}.union(*map(wanted, configs.values()))
    moments = collect_moments(
        console, network, shape, sorted(which), tokenizer, files, source, output, model, biases
    )
    source = replace(source, tokens=moments.tokens)
    presets = {folders[one]: config for one, config in configs.items()}
    weights = samples_of(network, shape, quantized)
    outputs.write(presets, moments, source, overlap.to_json(files), weights)
    rows = spread(moments, shape.layers)
    paths = []
    for one, folder in (outputs.folders(records, formats) if records else folders).items():
        settings = {"format": one, "tokens": source.tokens, "window": window, "dtype": dtype}
        record = make_record("calibration", [], model, settings, {"layers": rows}, files, seed)
        paths.append(record.write(folder))
    (output / resume.FILE).unlink(missing_ok=True)
    for folder in folders.values():
        print(outputs.as_preset(folder))
    console.print(spread_table(rows, made_for))
    for path in paths:
        console.print(f"record: {path}", markup=False, highlight=False, soft_wrap=True)


def _texts(files: list[Path], datasets: list[str], tokens: int) -> list[Path]:
    """The files, and a file for each dataset."""
    if not files and not datasets:
        raise OptionsError("calibrating needs text: give --text FILES or --dataset NAME.")
    if not datasets:
        return files
    from platformdirs import user_cache_dir

    from vllm_kvpca.calibration.dataset import DatasetName, fetch

    names = [DatasetName.parse(one) for one in datasets]
    folder = Path(os.environ.get("KVPCA_CACHE_DIR") or user_cache_dir("vllm-kvpca")) / "texts"
    return [*files, *(fetch(one, tokens, folder) for one in names)]


def collect_moments(
    console: Console,
    network: Any,
    shape: AttentionShape,
    which: Sequence[str],
    tokenizer: Any,
    files: Sequence[Path],
    source: Source,
    output: Path,
    model: str,
    biases: dict[int, KeyBias],
) -> Moments:
    """Second moments of the text; those that a run which was cut off has left are taken over."""
    from vllm_kvpca.calibration import text as texts
    from vllm_kvpca.calibration.collect import collect
    from vllm_kvpca.calibration.resume import Progress
    from vllm_kvpca.lab import progress
    from vllm_kvpca.lab.record import fingerprint

    budget = (files, tokenizer, source.window, source.tokens)
    with console.status("counting tokens"):
        total = texts.count_tokens(*budget, shape.head_dim, source.seed)
    if total < source.tokens:
        console.print(f"the text holds {total:,} tokens, not {source.tokens:,}: all of it is used.")
    saved = Progress.of_run(output, fingerprint(model), which, source)
    found = saved.load(network.device)
    if found:
        console.print(f"{found.tokens:,} tokens were done by an earlier run: going on from there.")
    windows = islice(texts.windows(*budget, source.seed), found.windows if found else 0, None)
    with progress.tokens(console, total, found.tokens if found else 0) as advance:
        arguments = network, shape, which, windows, advance, found, saved.save, biases
        return collect(*arguments, context=source.context)


def spread_table(rows: list[dict[str, Any]], title: str) -> Table:
    """What a basis can gain in each layer, for the terminal."""
    table = Table(
        title=f"{title}: K and V by layer",
        caption="Gain: arithmetic over geometric mean of the energies; 6 dB are one bit per "
        "component. Mean: share of the energy that is the same for every token.",
        caption_justify="left",
    )
    table.add_column("layer", justify="right")
    for which in ("K", "V"):
        for column in ("channel gain", "PCA gain", "condition", "mean"):
            table.add_column(f"{which} {column}", justify="right")
    by_layer: dict[int, list[str]] = {}
    for row in rows:
        by_layer.setdefault(row["layer"], []).extend(
            [
                f"{row['channel_gain_db']:.1f} dB",
                f"{row['coding_gain_db']:.1f} dB",
                f"{row['condition']:.0f}",
                f"{row['mean_share']:.0%}",
            ]
        )
    for layer, cells in by_layer.items():
        table.add_row(str(layer), *cells)
    return table
