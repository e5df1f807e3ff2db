"""Orthonormal bases (head_dim x components): identity, Hadamard, PCA.

A head vector x becomes components y = B^T x. All bases are square and orthonormal;
dropping components is the bands' business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def identity_basis(head_dim: int) -> torch.Tensor:
    """(head_dim, head_dim) float32: components are the values themselves."""
    return torch.eye(head_dim)


def hadamard_basis(head_dim: int) -> torch.Tensor:
    """Orthonormal matrix whose entries all have (nearly) the same magnitude.

    It spreads an outlier over all components, so that a uniform quantizer fits.
    Powers of two give Sylvester's Hadamard matrix. For head_dim = m * 2^k with odd m the
    factor m is an orthonormal DCT-II matrix: flat enough, and defined for every m.

    Returns:
        (head_dim, head_dim) float32.
    """
    power = head_dim & -head_dim
    basis = _dct(head_dim // power)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
    for _ in range(power.bit_length() - 1):
        basis = torch.kron(basis, step)
    return basis.float()


def _dct(size: int) -> torch.Tensor:
    n = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (n[:, None] + 0.5) * n[None, :]) * math.sqrt(2 / size)
    matrix[:, 0] /= math.sqrt(2)
    return matrix


def pca_basis(second_moment: torch.Tensor) -> torch.Tensor:
    """Eigenvectors of E[x x^T], largest eigenvalue first. No mean is subtracted.

    Attention sinks have almost no V but take most of the attention, so a subtracted mean
    would give exactly them an error that every other token then sees (docs/results.md).

    Args:
        second_moment: (..., head_dim, head_dim), symmetric, float64 recommended.

    Returns:
        (..., head_dim, head_dim) float32; column j is the j-th component's direction.
    """
    _, vectors = torch.linalg.eigh(second_moment.double())
    vectors = vectors.flip(-1)
    # An eigenvector's sign is arbitrary; fixing it makes calibration reproducible.
    largest = vectors.abs().argmax(-2, keepdim=True)
    sign = torch.gather(vectors, -2, largest).sign()
    return (vectors * sign).float()


def mix_bands(basis: torch.Tensor, widths: Sequence[int]) -> torch.Tensor:
    """Rotate the components of each band among themselves by a Hadamard matrix.

    A band keeps its span and its energy, but the energy is spread evenly over its components, so
    the one scale they share fits all of them.

    Args:
        basis: (..., head_dim, components).
        widths: of the bands, in order; they add up to `components`.
    """
    parts = basis.double().split(list(widths), -1)
    mixed = [part @ hadamard_basis(part.shape[-1]).double() for part in parts]
    return torch.cat(mixed, -1).float()


def orthonormality_error(basis: torch.Tensor) -> float:
    """Largest entry of |B^T B - I| over a stack (..., head_dim, head_dim)."""
    basis = basis.double()
    gram = basis.transpose(-1, -2) @ basis
    identity = torch.eye(basis.shape[-1], dtype=torch.float64, device=basis.device)
    return float((gram - identity).abs().max())
