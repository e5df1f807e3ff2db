"""The map between a raw head vector and its archived bytes: pure torch, no vLLM."""

from vllm_kvpca.codec.bands import Band, decode_bands, encode_bands, resolve_bands
from vllm_kvpca.codec.basis import (
    balanced_basis,
    encoder,
    hadamard_basis,
    identity_basis,
    mix_bands,
    pca_basis,
)

__all__ = [
    "Band",
    "balanced_basis",
    "decode_bands",
    "encode_bands",
    "encoder",
    "hadamard_basis",
    "identity_basis",
    "mix_bands",
    "pca_basis",
    "resolve_bands",
]
