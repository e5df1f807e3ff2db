"""How K and V are spread over directions, from a calibration's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_kvpca.lab.plots.themes import Theme, legend, pyplot, style, title
from vllm_kvpca.lab.record import Record

_NOTHING = 1e-5
"""Share of the energy below which a component is off the page: some models leave a few unused."""


def draw_spread(records: Sequence[Record], theme: Theme) -> Any:
    """By layer: coding gain of the PCA basis and of the channels as they are, and the share of the
    mean; over all layers: the spectrum."""
    record = records[0]
    rows: Any = record.results["layers"]
    figure, axes = pyplot().subplots(1, 3, figsize=(14, 4), layout="constrained")
    for which, colour in (("k", theme.cycle[1]), ("v", theme.cycle[0])):
        chosen = [row for row in rows if row["tensor"] == which]
        layers = [row["layer"] for row in chosen]
        name = which.upper()
        gain = [row["coding_gain_db"] for row in chosen]
        axes[0].plot(layers, gain, marker=".", color=colour, lw=1.8, label=f"{name}, PCA basis")
        plain = [row["channel_gain_db"] for row in chosen]
        axes[0].plot(layers, plain, color=colour, lw=1.4, ls=":", label=f"{name}, channels")
        share = [100 * row["mean_share"] for row in chosen]
        axes[1].plot(layers, share, marker=".", color=colour, lw=1.8, label=name)
        _spectrum(axes[2], [row["spectrum"] for row in chosen], colour, name)
    axes[0].set_ylim(0, 1.35 * axes[0].get_ylim()[1])  # room for the legend
    axes[0].set_ylabel("coding gain, dB (6 dB: one bit)")
    axes[1].set_ylabel("% of the energy")
    axes[1].set_ylim(0, 100)
    axes[2].set_yscale("log")
    axes[2].set_ylim(bottom=max(_NOTHING, axes[2].get_ylim()[0]))
    axes[2].set_ylabel("share of the energy, even spread = 1")
    axes[2].set_xlabel("component, strongest first")
    title(axes[0], f"{record.model}: what a basis can gain", theme)
    title(axes[1], "The same for every token (mean)", theme)
    title(axes[2], "Spectrum: mean and range over layers", theme)
    for index, one in enumerate(axes):
        if index < 2:
            one.set_xlabel("layer")
            one.set_xlim(0, max(layers))
        legend(one, theme)
        style(figure, one, theme)
    return figure


def _spectrum(axes: Any, spectra: list[list[float]], colour: str, name: str) -> None:
    count = len(spectra[0])
    columns = [[value * count for value in column] for column in zip(*spectra, strict=True)]
    x = range(1, count + 1)
    axes.fill_between(
        x, [min(c) for c in columns], [max(c) for c in columns], color=colour, alpha=0.25, lw=0
    )
    axes.plot(x, [sum(c) / len(c) for c in columns], color=colour, lw=1.8, label=name)
    axes.set_xlim(1, count)
