"""`vllm-kvpca calibrate`: a preset for one model, from text."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from vllm_kvpca.errors import CalibrationError, OptionsError

CONFIG_FILE = "config.json"
TEXT_HELP = "Text file, or folder with .txt files in it or below; more may follow it: --text a b c."
UNFINISHED = "moments.safetensors"
"""Of a run that was cut off (calibration/resume.py)."""


def calibrate(
    model: Annotated[str, typer.Option(help="Model folder or Hub name.")],
    format: Annotated[str, typer.Option(help="Format to fit, e.g. k5.5v5.5 or v-mixed.")],
    output: Annotated[Path, typer.Option(help="Folder of the new preset.")],
    text: Annotated[list[Path] | None, typer.Option(help=TEXT_HELP)] = None,
    more_text: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...")] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="Dataset of the Hub, NAME[@CONFIG][:SPLIT[:COLUMN]]; once for each."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to run, at most.")] = 100_000,
    window: Annotated[int, typer.Option(min=16, help="Tokens of one sequence.")] = 2048,
    seed: Annotated[int, typer.Option(help="Order in which the files take turns.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="The model's Hub name org/name; by default from --model.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; by default a GPU if any.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, ...; by default float32 on CPUs.")
    ] = "auto",
    note: Annotated[str, typer.Option(help="A sentence for the preset's card.")] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a preset.")] = False,
    records: Annotated[
        Path | None, typer.Option(help="Folder of the record; by default the preset's own.")
    ] = None,
) -> None:
    """Fit the bases of a format to a model and write a preset folder."""
    from vllm_kvpca.calibration import overlap
    from vllm_kvpca.calibration import text as texts
    from vllm_kvpca.calibration.card import Source, write_card
    from vllm_kvpca.calibration.collect import attention_shape
    from vllm_kvpca.calibration.fit import (
        band_energy,
        check_format,
        fit_bases,
        preset_config,
        wanted,
    )
    from vllm_kvpca.calibration.report import spread
    from vllm_kvpca.preset import save_preset

    check_format(format)
    _check_output(output, overwrite)
    files = texts.find_texts(_texts([*(text or []), *(more_text or [])], dataset or [], tokens))
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        tokenizer, network = _load(model, device, dtype)
        shape = attention_shape(network)
    revision = getattr(network.config, "_commit_hash", None)
    config = preset_config(format, name or _model_name(model), revision, shape)
    source = Source(
        texts=[texts.describe(path) for path in files],
        tokens=tokens,
        window=window,
        seed=seed,
        dtype=str(network.dtype).removeprefix("torch."),
        command=_command_line(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        note=note,
    )
    # K and V both, whatever the format needs: the report shows what another format would gain.
    which = sorted({*wanted(config), "k", "v"})
    every = _moments(console, network, shape, which, tokenizer, files, source, output, model)
    source = replace(source, tokens=every.tokens)
    moments = every.only(wanted(config))
    bases = fit_bases(moments, config)
    card = write_card(config, source, band_energy(moments, bases, config))
    save_preset(output, config, bases, card, overlap.to_json(files))
    rows = spread(every, shape.layers)
    path = _write_record(records or output, model, config, source, files, rows)
    (output / UNFINISHED).unlink(missing_ok=True)
    print(as_preset(output))
    console.print(spread_table(rows, config.model.name if config.model else model))
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


def _moments(
    console: Console,
    network: Any,
    shape: Any,
    which: list[str],
    tokenizer: Any,
    files: list[Path],
    source: Any,
    output: Path,
    model: str,
) -> Any:
    """Second moments of the text; those that a run which was cut off has left are taken over."""
    from vllm_kvpca.calibration import text as texts
    from vllm_kvpca.calibration.collect import collect
    from vllm_kvpca.calibration.resume import Progress as Saved
    from vllm_kvpca.lab.record import fingerprint

    budget = (files, tokenizer, source.window, source.tokens)
    with console.status("counting tokens"):
        total = texts.count_tokens(*budget, shape.head_dim, source.seed)
    if total < source.tokens:
        console.print(f"the text holds {total:,} tokens, not {source.tokens:,}: all of it is used.")
    arguments = {
        "model": fingerprint(model),
        "moments": which,
        "texts": [text.sha256 for text in source.texts],
        "budget": [source.tokens, source.window, source.seed, source.dtype],
    }
    saved = Saved(output, arguments)
    found = saved.load(network.device)
    if found:
        console.print(f"{found.tokens:,} tokens were done by an earlier run: going on from there.")
    windows = islice(texts.windows(*budget, source.seed), found.windows if found else 0, None)
    with _progress(console, total, found.tokens if found else 0) as advance:
        return collect(network, shape, which, windows, advance, found, saved.save)


def _write_record(
    folder: Path,
    model: str,
    config: Any,
    source: Any,
    files: list[Path],
    rows: list[dict[str, Any]],
) -> Path:
    from vllm_kvpca.lab.record import make_record

    settings = {
        "format": config.format,
        "tokens": source.tokens,
        "window": source.window,
        "dtype": source.dtype,
    }
    results = {"layers": rows}
    record = make_record("calibration", [], model, settings, results, files, source.seed)
    return record.write(folder)


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


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_file():
        raise OptionsError(f"--output {output} is a file: name a folder.")
    if not output.exists() or all(_is_left_over(path.name) for path in output.iterdir()):
        return
    if not (output / CONFIG_FILE).exists():
        raise OptionsError(f"--output {output} holds something else: name another folder.")
    if not overwrite:
        raise OptionsError(
            f"--output {output} holds a preset: name another folder, or add --overwrite."
        )


def _is_left_over(name: str) -> bool:
    """Whether a run that was cut off leaves a file or folder of this name."""
    from vllm_kvpca.whole_files import PREFIX

    return name == UNFINISHED or name.startswith(PREFIX)


def as_preset(folder: Path) -> str:
    """A folder as it is given to --kv-compression-preset: a bare name would be no folder."""
    return f"./{folder}" if len(folder.parts) == 1 and not folder.is_absolute() else str(folder)


def _load(model: str, device: str, dtype: str) -> tuple[Any, Any]:
    """Tokenizer and model, ready for forward passes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # one bar at a time
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto" and device == "cpu":
        dtype = "float32"  # most CPUs compute in bfloat16 slowly, and all round more
    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CalibrationError(
            f"{model!r} cannot be loaded: {reason} Give --model a folder of a transformers model "
            "or a Hub name org/name."
        ) from error
    return tokenizer, network.to(device).eval()


def _model_name(model: str) -> str:
    """A Hub name as it is; of a folder its last part."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else model


def _command_line() -> str:
    """The command as typed, with absolute paths cut to names: folders mean nothing elsewhere."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(Path(word).name if word.startswith(("/", "~")) else word for word in words)


@contextmanager
def _progress(console: Console, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    columns = (
        SpinnerColumn(),
        TextColumn("tokens"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("tokens", total=total, completed=done)
        yield lambda tokens: progress.advance(task, tokens)
