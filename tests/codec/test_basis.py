"""Bases are orthonormal where they shall be; each finds what it is meant to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_kvpca.codec import (
    balanced_basis,
    encoder,
    hadamard_basis,
    identity_basis,
    mix_bands,
    pca_basis,
)
from vllm_kvpca.codec.basis import orthonormality_error

HEAD_DIMS = [64, 80, 96, 112, 128, 256]


def known_covariance(head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """(directions, covariance) with eigenvalues 1, 1/2, 1/3, ..."""
    rng = np.random.default_rng(head_dim)
    directions, _ = np.linalg.qr(rng.standard_normal((head_dim, head_dim)))
    return directions, directions @ np.diag(1 / np.arange(1, head_dim + 1)) @ directions.T


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("make", [identity_basis, hadamard_basis])
def test_calibration_free_bases_are_orthonormal(make, head_dim):
    basis = make(head_dim)
    assert basis.shape == (head_dim, head_dim) and basis.dtype == torch.float32
    assert orthonormality_error(basis) < 1e-6


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_a_hadamard_basis_of_a_power_of_two_is_perfectly_flat(head_dim):
    assert torch.allclose(hadamard_basis(head_dim).abs(), torch.tensor(head_dim**-0.5))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_a_hadamard_basis_spreads_a_single_outlier(head_dim):
    """No component gets more than twice its even share of an outlier (DCT factor: sqrt 2)."""
    largest = hadamard_basis(head_dim).abs().max()
    assert largest <= 2 * head_dim**-0.5


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_pca_finds_the_directions_of_a_known_covariance(head_dim):
    directions, covariance = known_covariance(head_dim)
    basis = pca_basis(torch.tensor(covariance))
    assert orthonormality_error(basis) < 1e-5
    overlap = np.abs(np.sum(basis.double().numpy() * directions, axis=0))
    np.testing.assert_allclose(overlap, 1, atol=1e-5)


def test_pca_agrees_with_numpy_and_sorts_by_variance():
    _, covariance = known_covariance(96)
    values, vectors = np.linalg.eigh(covariance)
    basis = pca_basis(torch.tensor(covariance)).double().numpy()
    np.testing.assert_allclose(np.abs(basis), np.abs(vectors[:, ::-1]), atol=1e-5)
    variance = np.diag(basis.T @ covariance @ basis)
    np.testing.assert_allclose(variance, values[::-1], atol=1e-6)


def test_pca_fixes_the_signs_so_that_calibration_is_reproducible():
    basis = pca_basis(torch.tensor(known_covariance(64)[1]))
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    assert (largest > 0).all()


def test_pca_takes_a_stack_of_heads():
    stack = torch.stack([torch.tensor(known_covariance(64)[1]), torch.eye(64).double()])
    bases = pca_basis(stack)
    assert bases.shape == (2, 64, 64) and bases.dtype == torch.float32
    assert torch.equal(bases[0], pca_basis(stack[0]))
    assert orthonormality_error(bases) < 1e-5


def test_orthonormality_error_sees_the_worst_head():
    bases = torch.stack([torch.eye(8), torch.eye(8)])
    bases[1, 3, 3] = 1.1
    assert orthonormality_error(bases) == pytest.approx(0.21, abs=1e-6)


def keys_and_queries(head_dim: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Second moments with eigenvalues 1, 1/2, 1/3, ... each, in unrelated directions."""
    moment = torch.tensor(known_covariance(head_dim)[1])
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((head_dim, head_dim)))[0]
    return moment, torch.tensor(turn) @ moment @ torch.tensor(turn).T


def test_a_balanced_basis_shows_keys_and_queries_alike():
    moment, weight = keys_and_queries()
    basis = balanced_basis(moment, weight).double()
    keys = encoder(basis).T @ moment @ encoder(basis)
    queries = basis.T @ weight @ basis
    # Both are scaled to trace 1 and get a floor of 1e-4 of their mean energy.
    torch.testing.assert_close(keys / moment.trace(), queries / weight.trace(), rtol=0, atol=1e-4)
    energy = keys.diagonal()
    assert (keys - torch.diag(energy)).abs().max() < 1e-3 * energy.max()
    assert (energy[:-1] >= energy[1:] - 1e-4 * energy.max()).all()


def test_no_other_basis_loses_less_of_the_scores():
    """Errors of equal size in every component, proportional to the components' RMS."""
    moment, weight = keys_and_queries()

    def loss(basis: torch.Tensor) -> float:
        basis = basis.double()
        keys = encoder(basis).T @ moment @ encoder(basis)
        return float(keys.trace() * (basis.T @ weight @ basis).trace())

    least = loss(balanced_basis(moment, weight))
    root = float(torch.linalg.eigvals(moment @ weight).real.clamp_min(0).sqrt().sum())
    assert least == pytest.approx(root**2, rel=1e-2)  # the least there is, by Cauchy-Schwarz
    others = [torch.eye(64), hadamard_basis(64), pca_basis(moment), pca_basis(weight)]
    others.append(torch.diag((moment.diagonal() / weight.diagonal()) ** 0.25))
    assert all(loss(other) > 1.3 * least for other in others)


def test_an_encoder_undoes_its_basis():
    basis = mix_bands(balanced_basis(*keys_and_queries()), [24, 40])
    product = encoder(basis).double().T @ basis.double()
    torch.testing.assert_close(product, torch.eye(64).double(), rtol=0, atol=1e-5)
    orthonormal = hadamard_basis(64)
    assert encoder(orthonormal) is orthonormal
