"""The codec of one layer on one rank: a page layout and the bases of its KV heads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from vllm_kvpca.codec.bands import Band, decode_bands, encode_bands
from vllm_kvpca.codec.basis import ROTATED_RANGE, encoder
from vllm_kvpca.codec.key_bias import RUN, KeyBias
from vllm_kvpca.pages.layout import ArchiveLayout
from vllm_kvpca.preset import Preset


@dataclass(frozen=True)
class BiasTables:
    """What kernels need of a KeyBias (codec.key_bias), at fixed addresses.

    Attributes:
        slow: (kv_heads, head_dim) float32, KeyBias.slow.
        angles: (runs, head_dim) float32, KeyBias.angles of all runs of the longest sequence.
        query_matrix: (kv_heads, head_dim, 2 * head_dim) float32: K's basis, then KeyBias.products,
            so that one product rotates a query and makes what its bias scores are made of.
    """

    slow: torch.Tensor
    angles: torch.Tensor
    query_matrix: torch.Tensor


@dataclass(frozen=True)
class LayerCodec:
    """Encodes head vectors and rotates queries and outputs.

    Attributes:
        layout: where codes and scales lie in a page.
        k_basis, v_basis: (kv_heads, head_dim, head_dim) float32; None is the identity. V's is
            orthonormal.
        dtype: the model's dtype, in which 16-bit bands are stored.
        k_bias: taken out of K before it is projected; None if it is left in.
        k_tables: of k_bias, where kernels are to run.
        k_encoder: what K is multiplied with when it is archived; k_basis if that is orthonormal.
    """

    layout: ArchiveLayout
    k_basis: torch.Tensor | None
    v_basis: torch.Tensor | None
    dtype: torch.dtype
    k_bias: KeyBias | None = None
    k_tables: BiasTables | None = None
    k_encoder: torch.Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        k_encoder = None if self.k_basis is None else encoder(self.k_basis)
        object.__setattr__(self, "k_encoder", k_encoder)

    def with_layout(self, layout: ArchiveLayout) -> LayerCodec:
        """The same codec, the same matrices in memory, for pages of another size."""
        codec = copy.copy(self)
        object.__setattr__(codec, "layout", layout)
        return codec

    def with_tables(self, max_tokens: int) -> LayerCodec:
        """The same codec for kernels, for sequences of at most `max_tokens` tokens."""
        if self.k_bias is None:
            return self
        assert self.k_basis is not None  # the schema demands one
        runs = torch.arange(-(-max_tokens // RUN), device=self.k_bias.bias.device)
        matrix = torch.cat([self.k_basis, self.k_bias.products()], -1)
        tables = BiasTables(
            self.k_bias.slow.contiguous(), self.k_bias.angles(runs), matrix.contiguous()
        )
        return replace(self, k_tables=tables)

    def matrices(self) -> dict[str, torch.Tensor]:
        """What of the codec takes memory on the device, by name."""
        found = {"k_basis": self.k_basis, "v_basis": self.v_basis, "k_encoder": self.k_encoder}
        if self.k_bias is not None:
            found |= {"k_bias": self.k_bias.bias, "k_frequencies": self.k_bias.frequencies}
        if self.k_tables is not None:
            found |= {f"k_{name}": table for name, table in vars(self.k_tables).items()}
        return {name: matrix for name, matrix in found.items() if matrix is not None}

    def encode(
        self, x: torch.Tensor, which: str, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales of head vectors.

        Args:
            x: (tokens, kv_heads, head_dim) in the model's dtype.
            which: "k" or "v".
            positions: (tokens,) in their sequences.

        Returns:
            (tokens, kv_heads, code_bytes) uint8, (tokens, kv_heads, num_scales) bfloat16.
        """
        if which == "k" and self.k_bias is not None:
            x = x.float() - self.k_bias.turned(positions)
        basis = self.k_encoder if which == "k" else self.v_basis
        if basis is not None:
            x = x.float().clamp(-ROTATED_RANGE, ROTATED_RANGE)
            x = torch.einsum("thd,hdc->thc", x, basis)
        return encode_bands(x, self.bands(which))

    def decode(self, codes: torch.Tensor, scales: torch.Tensor, which: str) -> torch.Tensor:
        """Stored components in float32: (..., stored_width)."""
        return decode_bands(codes, scales, self.bands(which), raw_dtype=self.dtype)

    def restore(self, x: torch.Tensor, which: str, positions: torch.Tensor) -> torch.Tensor:
        """Head vectors of decoded components, zero where a band has 0 bits.

        Args:
            x: (tokens, kv_heads, stored_width) float32.
            positions: (tokens,) in their sequences.

        Returns:
            (tokens, kv_heads, head_dim).
        """
        basis = self.k_basis if which == "k" else self.v_basis
        kept = stored_components(self.bands(which), x.device)
        if basis is not None:
            out = torch.einsum("thc,hdc->thd", x, basis[..., kept])
        else:
            out = x.new_zeros(*x.shape[:-1], self.layout.head_dim)
            out[..., kept] = x
        if which == "k" and self.k_bias is not None:
            out += self.k_bias.turned(positions)
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

    def bias_scores(self, query: torch.Tensor, first: int, tokens: int) -> torch.Tensor | None:
        """Products of queries with what was taken out of K; None if nothing was.

        Args:
            query: (batch, kv_heads, rows, head_dim) float32, in head space.
            first, tokens: position of the first of so many tokens.

        Returns:
            (batch, kv_heads, rows, tokens) float32.
        """
        if self.k_bias is None:
            return None
        positions = torch.arange(first, first + tokens, device=query.device)
        runs, which = torch.unique(positions // RUN, return_inverse=True)
        products = (query @ self.k_bias.products()) @ self.k_bias.angles(runs).T
        return products[..., which]

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


def codec_of(
    preset: Preset,
    layer: int,
    heads: list[int],
    layout: ArchiveLayout,
    dtype: torch.dtype,
    device: torch.device,
) -> LayerCodec:
    """What a preset says of one layer, on `device`.

    Args:
        layer: index of the layer in the model. heads: global indices of the local KV heads.
    """
    k, v = (preset.basis(which, layer, heads, layout.head_dim) for which in "kv")
    k, v = (basis if basis is None else basis.to(device) for basis in (k, v))
    bias = preset.key_bias(layer, heads)
    return LayerCodec(layout, k, v, dtype, bias and bias.to(device))


@cache
def stored_components(bands: tuple[Band, ...], device: torch.device) -> slice | torch.Tensor:
    """Index of the components that are stored at all: all but those of 0-bit bands."""
    if all(band.bits for band in bands):
        return slice(None)
    kept = [torch.full((band.width,), band.bits > 0, device=device) for band in bands]
    return torch.cat(kept).nonzero().squeeze(-1)
