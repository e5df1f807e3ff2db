"""Every byte offset of a page. Nobody else computes offsets.

A page is what vLLM's block pool hands out: for one layer and one block, the bytes of all
local KV heads, head after head. Both cache groups use pages of equal size.

Recent page (group R), per head: `raw_block` tokens, each K then V in the model's dtype.

    token 0: K[head_dim] V[head_dim] | token 1: K V | ...

Archive page (group C), per head: four regions, each one array over the block's tokens, so
that a kernel reads every region with wide aligned loads:

    | K codes [N, k_code_bytes] | V codes [N, v_code_bytes] | K scales [N, k_scales] bf16
    | V scales [N, v_scales] bf16 | padding up to N * content_bytes |

N and band widths are multiples of 8, so every region starts on a
16-byte border of its head.

Worked example: head_dim 64, format k8v4 (K one 8-bit band, V one 4-bit band), N = 80.

    per token   K codes 64 B, V codes 32 B, K scale 2 B, V scale 2 B        = 100 B
    region      K codes at 0, V codes at 5120, K scales at 7680, V scales at 7840
    per head    80 * 100 = 8000 B; a recent page of 32 tokens has 32 * 256  = 8192 B
    token 3     K codes at 192, V codes at 5216, K scale at 7686, V scale at 7846
    ratio       256 / 100 = 2.56 by content; 80 / 32 = 2.5 by pages (192 B of padding)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvpca.codec.bands import (
    RAW_BYTES,
    SCALE_BYTES,
    SCALE_DTYPE,
    Band,
    code_bytes,
    num_scales,
)


def raw_token_bytes(head_dim: int) -> int:
    """Bytes of one raw token and head: K and V in a two-byte dtype."""
    return 2 * head_dim * RAW_BYTES


@dataclass(frozen=True)
class Region:
    """One array of an archive page: `width` bytes for each token, starting at `offset`."""

    offset: int
    width: int


@dataclass(frozen=True)
class ArchiveLayout:
    """Offsets inside one head's part of an archive page.

    Attributes:
        head_dim: length of a head vector.
        block_size: tokens per archive block, a multiple of 8.
        k_bands, v_bands: how K and V are stored.
    """

    head_dim: int
    block_size: int
    k_bands: tuple[Band, ...]
    v_bands: tuple[Band, ...]

    @property
    def content_bytes(self) -> int:
        """Archived bytes of one token and head: K and V, codes and scales."""
        scales = num_scales(self.k_bands) + num_scales(self.v_bands)
        return code_bytes(self.k_bands) + code_bytes(self.v_bands) + SCALE_BYTES * scales

    @property
    def v_bytes(self) -> int:
        """Archived bytes of V alone, scales included."""
        return code_bytes(self.v_bands) + SCALE_BYTES * num_scales(self.v_bands)

    @property
    def total_ratio(self) -> float:
        """Raw bytes over archived bytes of K and V, scales included, padding left out."""
        return raw_token_bytes(self.head_dim) / self.content_bytes

    @property
    def v_ratio(self) -> float:
        """The same of V alone. Never quote it without `total_ratio` beside it."""
        return raw_token_bytes(self.head_dim) / 2 / self.v_bytes

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's part of a page."""
        return self.block_size * self.content_bytes

    @property
    def k_codes(self) -> Region:
        return Region(0, code_bytes(self.k_bands))

    @property
    def v_codes(self) -> Region:
        return self._after(self.k_codes, code_bytes(self.v_bands))

    @property
    def k_scales(self) -> Region:
        return self._after(self.v_codes, SCALE_BYTES * num_scales(self.k_bands))

    @property
    def v_scales(self) -> Region:
        return self._after(self.k_scales, SCALE_BYTES * num_scales(self.v_bands))

    def _after(self, region: Region, width: int) -> Region:
        return Region(region.offset + region.width * self.block_size, width)

    def slice(self, heads: torch.Tensor, region: Region) -> torch.Tensor:
        """View of one region.

        Args:
            heads: (..., head_bytes) uint8, last dimension contiguous.

        Returns:
            (..., block_size, region.width) uint8, sharing memory with `heads`.
        """
        size = region.width * self.block_size
        flat = heads[..., region.offset : region.offset + size]
        return flat.unflatten(-1, (self.block_size, region.width))

    def scales(self, heads: torch.Tensor, region: Region) -> torch.Tensor:
        """Like `slice`, but (..., block_size, scales) in the scales' dtype."""
        if not region.width:  # torch cannot reinterpret an empty last dimension
            return heads.new_empty((*heads.shape[:-1], self.block_size, 0), dtype=SCALE_DTYPE)
        return self.slice(heads, region).view(SCALE_DTYPE)
