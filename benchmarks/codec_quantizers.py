"""Ways to store a head vector, for the codec study: what the product has, and what it might have.

A spec is a line of words: a basis, bands, and extras.

    weighted+mix 1/4:8 3/4:4            K as in k5v4
    hadamard 1:4 gauss                  16 Lloyd-Max levels instead of uniform steps
    pca+mix waterfill=30                bands chosen by reverse water-filling for 30 bytes

    basis    identity, hadamard, pca; with a second moment of what reads the vector (queries for K,
             the output projection for V): weighted, joint, balanced, channel
    +mix     Hadamard inside each band
    band     share of the components : bits (8, 4, 3, 2, 0)
    levels   of bands below 8 bits: signed, signed-search (uniform, see `uniform`), search (scale
             with the least error), gain (least-squares scale), gauss, laplace, fitted (Lloyd-Max
             tables); by default equal steps and codes from -qmax to qmax
    clip=C   uniform, scale for the absolute maximum or C times the RMS, whichever is less
    mean     a fixed mean is subtracted first
    pre      K before RoPE

Whatever the product can store is quantized by vllm_kvpca.codec itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache

import torch

from vllm_kvpca.codec import (
    balanced_basis,
    decode_bands,
    encode_bands,
    encoder,
    hadamard_basis,
    mix_bands,
    pca_basis,
)
from vllm_kvpca.codec.bands import SCALE_BYTES, SCALE_DTYPE, Band
from vllm_kvpca.codec.threads import one_thread

BASES = ("identity", "hadamard", "pca", "weighted", "joint", "balanced", "channel")
LEVELS = ("uniform", "signed", "signed-search", "search", "gain", "gauss", "laplace", "fitted")
SHRINK = torch.linspace(1.0, 0.55, 10)
"""Scales that "search" tries, as shares of the one that reaches the largest component."""
Bands = tuple[tuple[int, int], ...]
"""(width, bits) of each band."""


@dataclass(frozen=True)
class Spec:
    """A parsed spec; `bands` are shares, or `budget` bytes to fill."""

    basis: str
    mixed: bool
    shares: tuple[tuple[Fraction, int], ...]
    budget: int | None
    levels: str
    clip: float | None
    mean: bool
    pre: bool
    bias: bool


def parse(text: str) -> Spec:
    basis, *words = text.split()
    basis, _, mix = basis.partition("+")
    shares = tuple((Fraction(w.split(":")[0]), int(w.split(":")[1])) for w in words if ":" in w)
    budgets = [int(w.partition("=")[2]) for w in words if w.startswith("waterfill=")]
    rest = {w for w in words if ":" not in w and "=" not in w}
    levels = next((w for w in LEVELS if w in rest), "uniform")
    unknown = rest - {"mean", "pre", "bias", levels}
    if basis not in BASES or mix not in ("", "mix") or unknown:
        raise ValueError(f"{text!r} is no spec")
    budget = budgets[0] if budgets else None
    clips = [float(w.partition("=")[2]) for w in words if w.startswith("clip=")]
    clip = clips[0] if clips else None
    given = (word in rest for word in ("mean", "pre", "bias"))
    return Spec(basis, mix == "mix", shares, budget, levels, clip, *given)


@dataclass(frozen=True)
class Statistics:
    """What calibration found about K or V of one kind, per layer and KV head, float64.

    Attributes:
        moment: (layers, heads, D, D) E[x x^T].
        mean: (layers, heads, D).
        weight: (layers, heads, D, D) second moment of what the vector is multiplied with.
    """

    moment: torch.Tensor
    mean: torch.Tensor
    weight: torch.Tensor


class Quantizer:
    """Quantizes and restores the K or V of every layer: (batch, heads, tokens, D) each."""

    def __init__(self, spec: Spec, statistics: Statistics, device: str = "cpu") -> None:
        self.spec = spec
        moment, weight = statistics.moment, statistics.weight
        self.mean = statistics.mean.float().to(device) if spec.mean else None
        if spec.mean:
            moment = moment - statistics.mean[..., :, None] * statistics.mean[..., None, :]
        size = moment.shape[-1]
        self.bands = _resolve(spec, size) if spec.budget is None else _fill(spec, moment, weight)
        encode, decode = transform(spec, self.bands, moment, weight)
        self.encode, self.decode = encode.to(device), decode.to(device)
        self.table = None
        if spec.levels in ("gauss", "laplace", "fitted"):
            self.table = {bits: levels(spec.levels, bits).to(device) for bits in (4, 3, 2)}

    @property
    def bytes(self) -> int:
        """Per token and head, scales included."""
        codes = sum(width * bits for width, bits in self.bands) // 8
        return codes + SCALE_BYTES * sum(bits > 0 for _, bits in self.bands)

    def __call__(self, layer: int, x: torch.Tensor) -> torch.Tensor:
        """What is left of the (batch, heads, tokens, D) float32 K or V of a compressed layer."""
        if self.mean is not None:
            x = x - self.mean[layer][:, None]
        y = x @ self.encode[layer]
        if self.spec.levels == "signed" and all(bits in (8, 4, 0) for _, bits in self.bands):
            product = [Band(width, bits) for width, bits in self.bands]
            y = decode_bands(*encode_bands(y, product), product, raw_dtype=y.dtype)
        else:
            parts = y.split([width for width, _ in self.bands], -1)
            kept = zip(parts, self.bands, strict=True)
            y = torch.cat([self._band(part, bits) for part, (_, bits) in kept if bits], -1)
        x = y @ self.decode[layer][:, : y.shape[-1]]
        return x if self.mean is None else x + self.mean[layer][:, None]

    def _band(self, y: torch.Tensor, bits: int) -> torch.Tensor:
        if bits == 8 or self.table is None:
            if bits == 8:
                return uniform(y, bits, "uniform")
            return uniform(y, bits, self.spec.levels, self.spec.clip)
        scale = y.square().mean(-1, keepdim=True).sqrt().to(SCALE_DTYPE).float()
        return nearest(y / scale.clamp_min(1e-30), self.table[bits]) * scale


def uniform(
    y: torch.Tensor, bits: int, how: str = "uniform", clip: float | None = None
) -> torch.Tensor:
    """Equal steps with one scale per row.

    Codes are in [-qmax, qmax]. With "signed" and "signed-search" the largest component, whatever
    its sign, gets the code -qmax - 1, and the scale its opposite sign: one level more.
    """
    signed = how.startswith("signed")
    qmax = 2 ** (bits - 1) - 1
    largest = y.abs().amax(-1, keepdim=True) / qmax
    if signed:
        largest = y.gather(-1, y.abs().argmax(-1, keepdim=True)) / (-qmax - 1)
    if clip is not None:
        rms = y.square().mean(-1, keepdim=True).sqrt()
        largest = torch.minimum(largest, clip / qmax * rms)

    def codes(scale: torch.Tensor) -> torch.Tensor:
        divisor = torch.where(scale == 0, 1, scale)
        return (y / divisor).round().clamp(-qmax - signed, qmax)

    if how in ("search", "signed-search"):
        best, least = largest, torch.full_like(largest, torch.inf)
        for shrink in SHRINK.tolist() if how == "search" else (1.0, 0.9, 0.8):
            scale = (largest * shrink).to(SCALE_DTYPE).float()
            error = (codes(scale) * scale - y).square().sum(-1, keepdim=True)
            best = torch.where(error < least, scale, best)
            least = torch.minimum(error, least)
        return codes(best) * best
    scale = largest.to(SCALE_DTYPE).float()
    q = codes(scale)
    if how == "gain":
        gain = (q * y).sum(-1, keepdim=True) / q.square().sum(-1, keepdim=True).clamp_min(1)
        scale = gain.to(SCALE_DTYPE).float()
    return q * scale


def nearest(y: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Each value replaced by the nearest entry of a sorted table."""
    return table[torch.bucketize(y, (table[1:] + table[:-1]) / 2)]


@cache
def levels(which: str, bits: int) -> torch.Tensor:
    """Lloyd-Max levels (Lloyd, Least squares quantization in PCM, 1982) for unit variance."""
    u = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    if which == "laplace":
        samples = -torch.sign(u - 0.5) * torch.log1p(-2 * (u - 0.5).abs()) / 2**0.5
    elif which == "gauss":
        samples = torch.special.ndtri(u)
    else:
        samples = _fitted_samples()
    table = torch.quantile(samples, (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits)
    for _ in range(300):
        index = torch.bucketize(samples, (table[1:] + table[:-1]) / 2)
        table = torch.zeros_like(table).index_add_(0, index, samples) / torch.bincount(
            index, minlength=len(table)
        )
    return table.float()


_samples: list[torch.Tensor] = []


def set_fitted_samples(values: torch.Tensor) -> None:
    """Components, divided by their rows' RMS, that "fitted" fits its levels to."""
    _samples[:] = [values.double().flatten().cpu()]


def _fitted_samples() -> torch.Tensor:
    if not _samples:
        raise ValueError("no samples for fitted levels")
    return _samples[0].sort().values


def _resolve(spec: Spec, size: int) -> Bands:
    bands = tuple((int(share * size), bits) for share, bits in spec.shares)
    if sum(width for width, _ in bands) != size:
        raise ValueError(f"{spec.shares} do not add up")
    return bands


def transform(
    spec: Spec, bands: Bands, moment: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Matrices (layers, heads, D, D) with y = x @ encode and x = y @ decode, float32."""
    size = moment.shape[-1]
    widths = [width for width, _ in bands]
    if spec.basis in ("identity", "hadamard"):
        one = torch.eye(size) if spec.basis == "identity" else hadamard_basis(size)
        basis = one.expand(*moment.shape)
    elif spec.basis == "pca":
        basis = pca_basis(moment)
    elif spec.basis == "weighted":
        basis = pca_basis(_unit(moment) + _unit(weight))
    elif spec.basis == "joint":
        basis = joint_basis(moment, weight, widths)
    elif spec.basis == "channel":
        diagonal = [m.diagonal(dim1=-2, dim2=-1).clamp_min(1e-12) for m in (weight, moment)]
        inverse = torch.diag_embed((diagonal[1] / diagonal[0]) ** 0.25)
        basis = inverse @ hadamard_basis(size).double()
    else:
        basis = balanced_basis(moment, weight)
    if spec.mixed:
        basis = mix_bands(basis, widths)
    return encoder(basis.double()).float(), basis.mT.float()


@one_thread()
def joint_basis(moment: torch.Tensor, weight: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Orthonormal basis for which the error that a reader sees is least, band by band.

    A band of rounding errors costs tr(P moment) tr(P weight), P the projection on it. From the last
    band on, P is the span with the least eigenvalues of the sum of both, each divided by its trace
    in P: the first-order condition, found by iteration.
    """
    span = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    span = span.expand(*moment.shape)
    found: list[torch.Tensor] = []
    for width in reversed(widths):
        inner = [span.transpose(-1, -2) @ m @ span for m in (moment, weight)]
        traces = [m.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] for m in inner]
        for _ in range(20 if width < span.shape[-1] else 1):
            _, vectors = torch.linalg.eigh(inner[0] / traces[0] + inner[1] / traces[1])
            low = vectors[..., :width]
            traces = [((low.mT @ m) * low.mT).sum((-1, -2))[..., None, None] for m in inner]
        found.insert(0, span @ low.flip(-1))
        span = span @ vectors[..., width:]
    return torch.cat(found, -1).float()


def _unit(moment: torch.Tensor) -> torch.Tensor:
    return moment / moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _fill(spec: Spec, moment: torch.Tensor, weight: torch.Tensor) -> Bands:
    """Bands of at most `budget` bytes with the least expected error over all layers and heads."""
    size = moment.shape[-1]
    step = max(8, size // 8)
    encode, decode = transform(spec, ((size, 8),), moment, weight)
    mine = (encode.double().mT @ _unit(moment) @ encode.double()).diagonal(dim1=-2, dim2=-1)
    reader = (decode.double() @ _unit(weight) @ decode.double().mT).diagonal(dim1=-2, dim2=-1)
    best, least = None, float("inf")
    kinds = (8, 4, 3, 2, 0)
    for counts in itertools.product(range(size // step + 1), repeat=len(kinds)):
        bands = tuple((n * step, bits) for n, bits in zip(counts, kinds, strict=True) if n)
        stored = sum(width * bits // 8 + SCALE_BYTES * (bits > 0) for width, bits in bands)
        if sum(counts) * step != size or stored > (spec.budget or 0):
            continue
        widths = [width for width, _ in bands]
        cost = sum(
            _noise(bits, width) * (a.sum(-1) * b.sum(-1) / width).mean().item()
            for a, b, (width, bits) in zip(
                mine.split(widths, -1), reader.split(widths, -1), bands, strict=True
            )
        )
        if cost < least:
            best, least = bands, cost
    assert best is not None
    return best


@cache
def _noise(bits: int, width: int) -> float:
    """Error energy of a Gaussian band over its energy."""
    if not bits:
        return 1.0
    y = torch.randn(2000, width, generator=torch.Generator().manual_seed(0))
    return float((uniform(y, bits, "uniform") - y).square().sum() / y.square().sum())
