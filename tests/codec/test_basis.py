"""Bases are orthonormal; PCA finds the directions of a known covariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vllm_kvpca.codec import hadamard_basis, identity_basis, pca_basis
from vllm_kvpca.codec.basis import orthonormality_error

HEAD_DIMS = [64, 80, 96, 112, 128, 256]


@pytest.fixture(autouse=True)
def _one_thread():
    """Small eigenproblems are faster without threads that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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
