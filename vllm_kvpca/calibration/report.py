"""How K and V of each layer are spread over directions: what a basis can gain, before any is used.

All figures come from the second moments E[x x^T]; no mean is subtracted, because the codec
subtracts none. Their eigenvalues are the energies of the components in the PCA basis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vllm_kvpca.calibration.collect import Moments
from vllm_kvpca.codec.threads import one_thread

_FLOOR = 1e-12
"""Of the mean energy: what is weaker counts as this, so that a dead channel gives no infinity."""


@one_thread()
def spread(moments: Moments, layers: Sequence[int]) -> list[dict[str, Any]]:
    """One row for each layer and each of K and V, averaged over KV heads.

    Args:
        moments: of "k" and "v".
        layers: indices of the layers they were collected from, ascending.

    Returns:
        Rows with `layer`; `tensor`, "k" or "v"; `rms`, the root mean square of an element;
        `mean_share`, |E x|^2 / E|x|^2, the part of the energy that is the same for every token;
        `channel_gain_db`, the coding gain of the channels as they are; `coding_gain_db`, that
        of the PCA basis; `condition`, largest over smallest eigenvalue (median over heads); and
        `spectrum`, the eigenvalues as shares of the energy, largest first.
    """
    rows = []
    for which in ("k", "v"):
        firsts = moments.firsts[which]
        for layer, moment in zip(layers, moments.mean(which), strict=True):
            mean = firsts[layer].cpu() / moments.tokens
            rows.append({"layer": layer, "tensor": which, **_figures(moment, mean)})
    return sorted(rows, key=lambda row: (row["layer"], row["tensor"]))


def coding_gain_db(energies: torch.Tensor) -> torch.Tensor:
    """Arithmetic over geometric mean of component energies, dB.

    At the same bits, coding components apart, each with the bits that suit it, has an error
    smaller by this factor than coding them all alike (Jayant & Noll, Digital Coding of
    Waveforms, 1984, chapter 12; Goyal, Theoretical foundations of transform coding, IEEE Signal
    Processing Magazine 18(5), 2001). 6.02 dB are one bit per component.

    Args:
        energies: (..., components), not negative.

    Returns:
        (...) float64.
    """
    energies = energies.double()
    mean = energies.mean(-1, keepdim=True)
    logs = energies.clamp_min(mean * _FLOOR).log10().mean(-1)
    return 10 * (mean[..., 0].log10() - logs)


def _figures(moment: torch.Tensor, mean: torch.Tensor) -> dict[str, Any]:
    """Of one layer: (heads, head_dim, head_dim) second moments, (heads, head_dim) means."""
    channels = moment.diagonal(dim1=-2, dim2=-1)
    energy = channels.sum(-1)
    values = torch.linalg.eigvalsh(moment).flip(-1).clamp_min(0)
    floor = values.mean(-1) * _FLOOR
    return {
        "rms": float(channels.mean().sqrt()),
        "mean_share": float((mean.square().sum(-1) / energy).mean()),
        "channel_gain_db": float(coding_gain_db(channels).mean()),
        "coding_gain_db": float(coding_gain_db(values).mean()),
        "condition": float((values[:, 0] / values[:, -1].maximum(floor)).median()),
        "spectrum": [_short(x) for x in (values / energy[:, None]).mean(0).tolist()],
    }


def _short(value: float) -> float:
    return float(f"{value:.4g}")
