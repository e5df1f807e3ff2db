"""Bases (head_dim x components): identity, Hadamard, PCA, and one that is not orthonormal.

A head vector x becomes components y = E^T x, and x = B y. An orthonormal B is its own E; of a
`balanced_basis`, E is the inverse transposed (`encoder`). All bases are square; dropping
components is the bands' business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from vllm_kvpca.codec.threads import one_thread

LEAST_ENERGY = 1e-4
"""Share of the mean energy that every direction is taken to have at least."""
ROTATED_RANGE = 2.0**96
"""Values beyond it are cut to it before they are rotated, so that sums in float32 stay finite.

float16 ends far below, and nothing that a model computes in bfloat16 comes near; the rest up to
2^128 is room for the basis (MAX_CONDITION of preset.basis_file) and the sum over a head."""
ORTHONORMAL_TOLERANCE = 5e-3
"""Entries of float16 bases are off by up to 5e-4; sums over 256 of them stay below this."""


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


@one_thread()
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


@one_thread()
def balanced_basis(moment: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Basis for vectors of which only products with others matter: keys, read by queries.

    Components y = E^T k are rounded with errors of equal size, and an error e of them is seen as
    (B^T q)^T e. Keys want E small where they are large, queries want B = E^-T small where they
    are large: the loss tr(E^T moment E) tr(B^T weight B) is least for the symmetric E with
    E moment E = E^-1 weight E^-1, the square root of the geometric mean of moment^-1 and weight
    (Bhatia, Positive Definite Matrices, 2007, chapter 4), followed by any rotation. The rotation
    taken is to the eigenvectors of what both have become, largest first, so that bands fit.

    Args:
        moment: (..., head_dim, head_dim), E[k k^T], float64 recommended.
        weight: the same shape, E[q q^T].

    Returns:
        B, (..., head_dim, head_dim) float32, invertible; its `encoder` gives components.
    """
    moment, weight = _regular(moment), _regular(weight)
    root, back = _power(moment, 0.5), _power(moment, -0.5)
    mean = back @ _power(root @ weight @ root, 0.5) @ back
    stretch = _power(mean, 0.5)
    turn = pca_basis(stretch @ moment @ stretch).double()
    return (_power(mean, -0.5) @ turn).float()


def _regular(moment: torch.Tensor) -> torch.Tensor:
    """Scaled to trace 1, with a floor under directions that the text does not show."""
    size = moment.shape[-1]
    moment = moment.double() / moment.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
    eye = torch.eye(size, dtype=moment.dtype, device=moment.device)
    return moment + LEAST_ENERGY / size * eye


def _power(matrix: torch.Tensor, exponent: float) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(1e-30)[..., None, :] ** exponent) @ vectors.mT


@one_thread()
def encoder(basis: torch.Tensor) -> torch.Tensor:
    """E with E^T B = 1: the basis itself if it is orthonormal, else its inverse transposed.

    Args:
        basis: (..., head_dim, head_dim), invertible.
    """
    if orthonormality_error(basis) < ORTHONORMAL_TOLERANCE:
        return basis
    return torch.linalg.inv(basis.double()).mT.contiguous().to(basis.dtype)


@one_thread()
def condition(basis: torch.Tensor) -> float:
    """Largest condition number of a stack (..., head_dim, head_dim)."""
    return float(torch.linalg.cond(basis.double()).max())


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
