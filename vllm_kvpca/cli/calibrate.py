"""`vllm-kvpca calibrate`: a preset for one model, from text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
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

from vllm_kvpca.errors import CalibrationError, OptionsError

CONFIG_FILE = "config.json"


def calibrate(
    model: Annotated[str, typer.Option(help="Model folder or Hub name.")],
    format: Annotated[str, typer.Option(help="Format to fit, e.g. v-mixed or v-rank-int8.")],
    text: Annotated[list[Path], typer.Option(help="Text file; more may follow it: --text a b c.")],
    output: Annotated[Path, typer.Option(help="Folder of the new preset.")],
    more_text: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...")] = None,
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
) -> None:
    """Fit the bases of a format to a model and write a preset folder."""
    from vllm_kvpca.calibration import overlap
    from vllm_kvpca.calibration import text as texts
    from vllm_kvpca.calibration.card import Source, write_card
    from vllm_kvpca.calibration.collect import attention_shape, collect
    from vllm_kvpca.calibration.fit import (
        band_energy,
        check_format,
        fit_bases,
        preset_config,
        wanted,
    )
    from vllm_kvpca.preset import save_preset

    check_format(format)
    _check_output(output, overwrite)
    files = texts.check_files([*text, *(more_text or [])])
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        tokenizer, network = _load(model, device, dtype)
        shape = attention_shape(network)
    revision = getattr(network.config, "_commit_hash", None)
    config = preset_config(format, name or _model_name(model), revision, shape)
    with console.status("counting tokens"):
        total = texts.count_tokens(files, tokenizer, window, tokens, shape.head_dim, seed)
    if total < tokens:
        console.print(f"the text holds {total:,} tokens, not {tokens:,}: all of it is used.")
    with _progress(console, total) as advance:
        windows = texts.windows(files, tokenizer, window, tokens, seed)
        moments = collect(network, shape, wanted(config), windows, advance)
    bases = fit_bases(moments, config)
    source = Source(
        texts=[texts.describe(path) for path in files],
        tokens=moments.tokens,
        window=window,
        seed=seed,
        dtype=str(network.dtype).removeprefix("torch."),
        command=_command_line(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        note=note,
    )
    save_preset(
        output, config, bases, write_card(config, source, band_energy(moments, bases, config))
    )
    overlap.save(output, files)
    print(output)


def _check_output(output: Path, overwrite: bool) -> None:
    if output.is_file():
        raise OptionsError(f"--output {output} is a file: name a folder.")
    if not output.exists() or not any(output.iterdir()):
        return
    if not (output / CONFIG_FILE).exists():
        raise OptionsError(f"--output {output} holds something else: name another folder.")
    if not overwrite:
        raise OptionsError(
            f"--output {output} holds a preset: name another folder, or add --overwrite."
        )


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
def _progress(console: Console, total: int) -> Iterator[Callable[[int], None]]:
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
        task = progress.add_task("tokens", total=total)
        yield lambda tokens: progress.advance(task, tokens)
