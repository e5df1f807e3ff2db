"""The card of a preset (README.md): where it comes from, what it stores, what it costs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from vllm_kvpca.calibration.text import TextFile, describe
from vllm_kvpca.pages import ArchiveLayout, raw_token_bytes
from vllm_kvpca.preset.measured import NOT_MEASURED
from vllm_kvpca.preset.schema import PresetConfig, TensorFormat

MEASURED_ROW = "| Perplexity against stock |"
"""Start of the card's row that `vllm-kvpca presets --from-records` fills in."""

_LIMITS = """\
* For this model only: the server refuses it for other weights or another shape.
* The basis fits text like the calibration text; other languages and domains may lose more.
* What the table of measurements does not list was not measured.
"""


@dataclass(frozen=True)
class Source:
    """What a preset was made from.

    Attributes:
        texts: the files, in the order of the command line.
        tokens: how many were run, in windows of `window` tokens at most.
        context: positions over which windows began; 0: all began at the first.
        dtype: in which the model computed.
        command: the command line.
        date: UTC, ISO 8601.
        note: anything else a reader must know, "" for nothing.
    """

    texts: Sequence[TextFile]
    tokens: int
    window: int
    seed: int
    dtype: str
    command: str
    date: str
    note: str = ""
    context: int = 0


def source_of_now(
    files: Sequence[Path],
    tokens: int,
    window: int,
    seed: int,
    dtype: str,
    note: str = "",
    context: int = 0,
) -> Source:
    """The source of what the running command makes of these files."""
    return Source(
        texts=[describe(path) for path in files],
        tokens=tokens,
        window=window,
        seed=seed,
        dtype=dtype,
        command=_command_line(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        note=note,
        context=context,
    )


def _command_line() -> str:
    """The command as typed, with absolute paths cut to names: folders mean nothing elsewhere."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    return shlex.join(Path(word).name if word.startswith(("/", "~")) else word for word in words)


def write_card(
    config: PresetConfig,
    source: Source,
    energy: dict[str, list[float]],
    measured: str = NOT_MEASURED,
) -> str:
    """Text of README.md.

    Args:
        config: of a calibrated preset.
        energy: "k", "v" to the share of the energy in each band (see `fit.band_energy`).
        measured: perplexity against stock, in words.
    """
    model = config.model
    assert model is not None  # the schema demands it for calibrated formats
    bands = {"k": config.k.resolve(model.head_dim), "v": config.v.resolve(model.head_dim)}
    layout = ArchiveLayout(model.head_dim, 16, bands["k"], bands["v"])
    texts = "\n".join(f"| {t.name} | {t.bytes:,} | `{t.sha256}` |" for t in source.texts)
    energies = "".join(
        f"* Energy of {which.upper()} per band, averaged over layers and heads: "
        f"{', '.join(f'{share:.2%}' for share in shares)}\n"
        for which, shares in energy.items()
    )
    note = f"\n{source.note}\n" if source.note else ""
    layers = "all" if config.layers is None else ", ".join(map(str, config.layers))
    return f"""\
# {config.format} for {model.name}

{config.description}

* Base model: {model.name}, revision {model.revision or "unknown"}; {model.num_layers} layers, \
{model.num_kv_heads} KV heads, head_dim {model.head_dim}; compressed layers: {layers}
* K: {_describe(config.k)}
* V: {_describe(config.v)}
{energies}
| Per token and KV head | raw | archived | ratio |
| --- | --- | --- | --- |
| K and V, scales included | {raw_token_bytes(model.head_dim)} B | {layout.content_bytes} B \
| **{layout.total_ratio:.2f}** |
| V alone | {raw_token_bytes(model.head_dim) // 2} B | {layout.v_bytes} B | {layout.v_ratio:.2f} |

## Measured

| What | Result |
| --- | --- |
{MEASURED_ROW} {measured} |

## Calibration

{source.tokens:,} tokens in windows of up to {source.window:,}\
{f" that began all over {source.context:,} positions" if source.context else ""}, seed \
{source.seed}, model in {source.dtype}, {source.date}:

    {source.command}
{note}
| Text | bytes | sha256 |
| --- | --- | --- |
{texts}

## Limits

{_LIMITS}"""


def _describe(tensor: TensorFormat) -> str:
    bands = ", ".join(
        f"{band.share} of the components {f'in {band.bits} bits' if band.bits else 'dropped'}"
        for band in tensor.bands
    )
    if tensor.bands[0].bits == 16:
        return "raw"
    return f"basis {tensor.basis}{', without its bias' * tensor.without_bias}; {bands}"
