"""`vllm-kvpca tune`: the format for a model that meets a ratio or a loss, as a preset."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vllm_kvpca.cli.calibrate import CONTEXT_HELP, QUANTIZED_HELP, TEXT_HELP, collect_moments
from vllm_kvpca.errors import CalibrationError

if TYPE_CHECKING:
    from vllm_kvpca.calibration.card import Source
    from vllm_kvpca.calibration.collect import AttentionShape
    from vllm_kvpca.calibration.tune import Tuner
    from vllm_kvpca.preset import Preset
    from vllm_kvpca.preset.weights import WeightSamples


def tune(
    model: Annotated[str, typer.Option(help="Model folder or Hub name.")],
    text: Annotated[list[Path], typer.Option(help=TEXT_HELP)],
    output: Annotated[Path, typer.Option(help="Folder of the new preset, and of tune.json.")],
    more_text: Annotated[list[Path] | None, typer.Argument(metavar="[FILES]...")] = None,
    target_ratio: Annotated[
        float | None, typer.Option(help="Least total ratio (K and V, scales included), e.g. 2.67.")
    ] = None,
    target_ppl_delta: Annotated[
        float | None, typer.Option(help="Most relative perplexity change, e.g. 0.01 for 1 %.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to calibrate on.")] = 100_000,
    measure_tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure on.")] = 16_384,
    window: Annotated[int, typer.Option(min=16, help="Tokens of one sequence.")] = 2048,
    context: Annotated[int | None, typer.Option(min=0, help=CONTEXT_HELP)] = None,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also measure the chosen format layer by layer.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Order in which the files take turns.")] = 0,
    name: Annotated[
        str | None, typer.Option(help="The model's Hub name org/name; by default from --model.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...; by default a GPU if any.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, ...; by default float32 on CPUs.")
    ] = "auto",
    quantized: Annotated[str, typer.Option(help=QUANTIZED_HELP)] = "",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a preset.")] = False,
) -> None:
    """Choose a format by measurement, fit its bases, and write a preset and a record.

    With --target-ratio the format that loses least among those that reach it, with
    --target-ppl-delta the highest ratio that loses no more. A run that was cut off goes on where it
    stopped.
    """
    from vllm_kvpca.calibration import output as outputs
    from vllm_kvpca.calibration import overlap, resume
    from vllm_kvpca.calibration import text as texts
    from vllm_kvpca.calibration.card import source_of_now
    from vllm_kvpca.calibration.collect import attention_shape, positions_of
    from vllm_kvpca.calibration.key_bias import key_biases
    from vllm_kvpca.calibration.network import load, name_of, samples_of
    from vllm_kvpca.calibration.tune import (
        STATE_FILE,
        Target,
        Tuner,
        candidates,
        choose,
        key_of,
        moments_wanted,
    )
    from vllm_kvpca.lab import progress
    from vllm_kvpca.lab.record import fingerprint, make_record

    target = Target(target_ratio, target_ppl_delta)
    outputs.check(output, [output], overwrite, own=[STATE_FILE])
    files = texts.find_texts([*text, *(more_text or [])])
    console = Console(stderr=True)
    with console.status(f"loading {model}"):
        tokenizer, network = load(model, device, dtype)
        shape = attention_shape(network)
    with console.status("reading text"):
        everything = list(texts.windows(files, tokenizer, window, tokens + measure_tokens, seed))
    fit_on, measure_on = split(everything, tokens, window)
    revision = getattr(network.config, "_commit_hash", None)
    biases = key_biases(network, shape)
    presets = candidates(name or name_of(model), revision, shape, bool(biases))
    dtype = str(network.dtype).removeprefix("torch.")
    context = positions_of(network) if context is None else context
    source = source_of_now(files, sum(map(len, fit_on)), window, seed, dtype, context=context)
    wanted = moments_wanted(presets)
    moments = collect_moments(
        console, network, shape, wanted, tokenizer, files, source, output, model, biases
    )
    settings: dict[str, Any] = {
        "tokens": moments.tokens,
        "measure_tokens": sum(map(len, measure_on)),
        "window": window,
        "dtype": dtype,
    }
    sums = [text.sha256 for text in source.texts]
    key = key_of(model=fingerprint(model), texts=sums, seed=seed, **settings)
    tuner = Tuner(network, shape, moments, measure_on, output, key, seed)

    def measure(preset: Preset) -> dict[str, Any]:
        known = preset.name in tuner.results
        result = _measured(console, preset.name, tuner, measure_on, known, preset)
        console.print(
            f"{preset.name}: total ratio {result['total_ratio']:.2f}, perplexity "
            f"{result['perplexity_change']:+.2%}{' (measured before)' if known else ''}"
        )
        return result

    chosen = choose(presets, shape.head_dim, target, measure)
    if per_layer:
        total = sum(map(len, measure_on)) * len(shape.layers)
        with progress.tokens(console, total) as advance:
            tuner.per_layer(chosen, advance)
    # All of the text: what was measured on decided, so it says no more than what was fitted on.
    about = overlap.to_json(files), samples_of(network, shape, quantized)
    _save(output, tuner, chosen, source, settings["measure_tokens"], *about)
    results = {"chosen": chosen.name, "formats": tuner.results, "layers": tuner.layers}
    settings |= {"target_ratio": target_ratio, "target_ppl_delta": target_ppl_delta}
    record = make_record("tune", [output.name], model, settings, results, files, seed)
    record.write(output)
    (output / resume.FILE).unlink(missing_ok=True)
    _report(tuner, chosen, shape)
    print(outputs.as_preset(output))


def split(
    windows: list[list[int]], tokens: int, window: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to fit on, `tokens` in all, and the full ones of the rest to measure on.

    Raises:
        CalibrationError: fewer than two are left to measure on.
    """
    count = seen = 0
    while count < len(windows) and seen < tokens:
        seen += len(windows[count])
        count += 1
    rest = [one for one in windows[count:] if len(one) == window]
    if len(rest) < 2:
        raise CalibrationError(
            f"after {tokens:,} tokens to calibrate on, the text leaves {len(rest)} windows of "
            f"{window:,} tokens to measure on, and 2 are needed: add files to --text, or lower "
            "--tokens or --window."
        )
    return windows[:count], rest


def _measured(
    console: Console,
    title: str,
    tuner: Tuner,
    windows: list[list[int]],
    known: bool,
    preset: Preset,
) -> dict[str, Any]:
    from vllm_kvpca.lab import progress

    if known:
        return tuner.measure(preset)
    console.print(f"measuring {title}")
    with progress.tokens(console, sum(map(len, windows))) as advance:
        return tuner.measure(preset, advance)


def _save(
    output: Path,
    tuner: Tuner,
    chosen: Preset,
    source: Source,
    measured_on: int,
    texts: str,
    weights: WeightSamples | None,
) -> None:
    from vllm_kvpca.calibration.card import write_card
    from vllm_kvpca.calibration.fit import band_energy
    from vllm_kvpca.lab.table import change
    from vllm_kvpca.preset import save_preset

    measured = (
        f"{change(tuner.results[chosen.name])} with every token stored, its own included "
        f"(`vllm-kvpca tune`, {measured_on:,} tokens that were not fitted on, of the same files)"
    )
    if not chosen.config.calibrated:
        card = (
            f"# {chosen.name}\n\n{chosen.config.description} Needs no calibration: "
            f"`--kv-compression-preset {chosen.name}` does the same.\n\nPerplexity against stock: "
            f"{measured}.\n\n    {source.command}\n"
        )
        save_preset(output, chosen.config, {}, card, texts)
        return
    fitted = tuner.fitted(chosen)
    energy = band_energy(
        tuner.moments.only([which for which in "kv" if which in fitted.bases]),
        fitted.bases,
        fitted.config,
    )
    card = write_card(fitted.config, source, energy, measured)
    save_preset(output, fitted.config, fitted.bases, card, texts, weights)


def _report(tuner: Tuner, chosen: Preset, shape: AttentionShape) -> None:
    table = Table(caption=f"chosen: {chosen.name}", caption_justify="left")
    for column in ("format", "total ratio", "V ratio", "perplexity change", "95 % interval"):
        table.add_column(column, justify="left" if column == "format" else "right")
    for name, one in sorted(tuner.results.items(), key=lambda item: item[1]["total_ratio"]):
        low, high = one["perplexity_change_ci95"]
        ratios = (f"{one['total_ratio']:.2f}", f"{one['v_ratio']:.2f}")
        change = f"{one['perplexity_change']:+.3%}"
        table.add_row(name, *ratios, change, f"{low:+.3%} to {high:+.3%}")
    Console().print(table)
    layers = tuner.layers.get(chosen.name, [])
    if len(layers) < len(shape.layers):
        return
    worst = sorted(layers, key=lambda one: -one["perplexity_change"])[:5]
    listed = ", ".join(f"{one['layer']} ({one['perplexity_change']:+.3%})" for one in worst)
    Console(soft_wrap=True).print(
        f"layers that lose most: {listed}. The server compresses all full-attention layers or none."
    )
