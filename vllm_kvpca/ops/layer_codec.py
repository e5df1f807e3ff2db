"""The codec of one layer on one rank: a page layout and the bases of its KV heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache

import torch

from vllm_kvpca.codec.bands import Band, decode_bands, encode_bands
from vllm_kvpca.codec.basis import ROTATED_RANGE, encoder
from vllm_kvpca.pages.layout import ArchiveLayout


@dataclass(frozen=True)
class LayerCodec:
    """Encodes head vectors and rotates queries and outputs.

    Attributes:
        layout: where codes and scales lie in a page.
        k_basis, v_basis: (kv_heads, head_dim, head_dim) float32; None is the identity. V's is
            orthonormal.
        dtype: the model's dtype, in which 16-bit bands are stored.
        k_encoder: what K is multiplied with when it is archived; k_basis if that is orthonormal.
    """

    layout: ArchiveLayout
    k_basis: torch.Tensor | None
    v_basis: torch.Tensor | None
    dtype: torch.dtype
    k_encoder: torch.Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        k_encoder = None if self.k_basis is None else encoder(self.k_basis)
        object.__setattr__(self, "k_encoder", k_encoder)

    def with_layout(self, layout: ArchiveLayout) -> LayerCodec:
        """The same codec, the same matrices in memory, for pages of another size."""
        codec = copy.copy(self)
        object.__setattr__(codec, "layout", layout)
        return codec

    def matrices(self) -> dict[str, torch.Tensor]:
        """What of the codec takes memory on the device, by name."""
        found = {"k_basis": self.k_basis, "v_basis": self.v_basis, "k_encoder": self.k_encoder}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    def encode(self, x: torch.Tensor, which: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of head vectors.

        Args:
            x: (tokens, kv_heads, head_dim) in the model's dtype.
            which: "k" or "v".

        Returns:
            (tokens, kv_heads, code_bytes) uint8, (tokens, kv_heads, num_scales) bfloat16.
        """
        basis = self.k_encoder if which == "k" else self.v_basis
        if basis is not None:
            x = x.float().clamp(-ROTATED_RANGE, ROTATED_RANGE)
            x = torch.einsum("thd,hdc->thc", x, basis)
        return encode_bands(x, self.bands(which))

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, which: str) -> torch.Tensor:
        """Stored components in float32: (..., stored_width)."""
        return decode_bands(codes, scales, self.bands(which), raw_dtype=self.dtype)

    def restore(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """Head vectors of decoded components, zero where a band has 0 bits.

        Args:
            x: (tokens, kv_heads, stored_width) float32.

        Returns:
            (tokens, kv_heads, head_dim).
        """
        basis = self.k_basis if which == "k" else self.v_basis
        kept = stored_components(self.bands(which), x.device)
        if basis is not None:
            return torch.einsum("thc,hdc->thd", x, basis[..., kept])
        out = x.new_zeros(*x.shape[:-1], self.layout.head_dim)
        out[..., kept] = x
        return out

    def bands(self, which: str) -> tuple[Band, ...]:
        return self.layout.k_bands if which == "k" else self.layout.v_bands

    def rotate_query(self, query: torch.Tensor) -> torch.Tensor:
        """Queries in K's component space, so that q . k = (B^T q) . (E^T k).

        Args:
            query: (batch, kv_heads, rows, head_dim) float32.

        Returns:
            (batch, kv_heads, rows, stored_width).
        """
        if self.k_basis is not None:
            query = query @ self.k_basis
        return query[..., stored_components(self.layout.k_bands, query.device)]

    def restore_output(self, output: torch.Tensor) -> torch.Tensor:
        """Head vectors from the weighted sum of V's components: one product with B^T.

        Args:
            output: (batch, kv_heads, rows, stored_width) float32.

        Returns:
            (batch, kv_heads, rows, head_dim).
        """
        if self.v_basis is None:
            return output
        kept = stored_components(self.layout.v_bands, output.device)
        return output @ self.v_basis[..., kept].transpose(-1, -2)


@cache
def stored_components(bands: tuple[Band, ...], device: torch.device) -> slice | torch.Tensor:
    """Index of the components that are stored at all: all but those of 0-bit bands."""
    if all(band.bits for band in bands):
        return slice(None)
    kept = [torch.full((band.width,), band.bits > 0, device=device) for band in bands]
    return torch.cat(kept).nonzero().squeeze(-1)
