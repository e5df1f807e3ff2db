"""Every byte offset of a page. Nobody else computes offsets.

A page is what vLLM's block pool hands out: for one layer and one block, the bytes of all
local KV heads, head after head. Both cache groups use pages of equal size.

Recent page (recent tier), per head: `raw_block` tokens, each K then V in the model's dtype.

    token 0: K[head_dim] V[head_dim] | token 1: K V | ...

Archive page (archive tier), per head: four regions, so that a kernel reads each with wide aligned
loads:

    | K codes [N, k_code_bytes] | V codes [N / 8, v_codes, 8] | K scales [N, k_scales] bf16
    | V scales [N, v_scales] bf16 |

Scores sum over a token's components, so K's codes of a token lie together. Outputs sum over
tokens, so V's codes of 8 tokens lie together, one code after another (a code is a byte, or
two bytes in a 16-bit band): a matrix instruction takes both as they are.

N and band widths are multiples of 8, so every region starts on a 16-byte border of its head.

Worked example: head_dim 64, format k8v4 (K one 8-bit band, V one 4-bit band), N = 80.

    per token   K codes 64 B, V codes 32 B, K scale 2 B, V scale 2 B        = 100 B
    region      K codes at 0, V codes at 5120, K scales at 7680, V scales at 7840
    per head    80 * 100 = 8000 B; a recent page of 32 tokens has 32 * 256  = 8192 B
    token 11    K codes at 704, V codes at 5379, 5387, ... 5627, K scale at 7702, V at 7862
    ratio       256 / 100 = 2.56 by content; 80 / 32 = 2.5 by pages (192 B of padding)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvpca.codec.bands import (
    RAW_BITS,
    RAW_BYTES,
    SCALE_BYTES,
    SCALE_DTYPE,
    Band,
    code_bytes,
    num_scales,
)

TOGETHER = 8
"""Tokens whose V codes lie together. The block sizes are multiples of it."""


def raw_token_bytes(head_dim: int) -> int:
    """Bytes of one raw token and head: K and V in a two-byte dtype."""
    return 2 * head_dim * RAW_BYTES


@dataclass(frozen=True)
class Region:
    """One part of an archive page: `width` bytes for each token, starting at `offset`."""

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

    def codes(self, heads: torch.Tensor, which: str) -> list[torch.Tensor]:
        """Views of the stored bands' codes, one for each band that is stored.

        Args:
            heads: (..., head_bytes) uint8, last dimension contiguous.
            which: "k" or "v".

        Returns:
            (..., block_size / 8, 8, codes) each, sharing memory with `heads`: uint8, or int16
            in place of the values of a 16-bit band.
        """
        region = self.k_codes if which == "k" else self.v_codes
        area = heads[..., region.offset : region.offset + region.width * self.block_size]
        area = area.unflatten(-1, (self.block_size // TOGETHER, TOGETHER * region.width))
        views, byte = [], 0
        for band in self.k_bands if which == "k" else self.v_bands:
            if not band.bits:
                continue
            kind = torch.int16 if band.bits == RAW_BITS else torch.uint8
            first, last = byte, byte + band.code_bytes
            byte = last
            if which == "k":
                rows = area.unflatten(-1, (TOGETHER, region.width))
                views.append(rows[..., first:last].view(kind))
            else:
                run = area[..., TOGETHER * first : TOGETHER * last].view(kind)
                views.append(run.unflatten(-1, (-1, TOGETHER)).transpose(-1, -2))
        return views

    def load_codes(
        self, pages: torch.Tensor, which: str, block: torch.Tensor, token: torch.Tensor
    ) -> torch.Tensor:
        """Codes of some tokens.

        Args:
            pages: (blocks, kv_heads, head_bytes) uint8.
            block, token: (n,) where each token is.

        Returns:
            (n, kv_heads, code_bytes) uint8, as codec.bands.decode_bands takes them.
        """
        row, lane = token // TOGETHER, token % TOGETHER
        parts = [
            view[block, :, row, lane].contiguous().view(torch.uint8)
            for view in self.codes(pages, which)
        ]
        if not parts:
            return pages.new_empty((len(block), pages.shape[1], 0))
        return torch.cat(parts, -1)

    def store_codes(
        self,
        pages: torch.Tensor,
        which: str,
        block: torch.Tensor,
        token: torch.Tensor,
        codes: torch.Tensor,
    ) -> None:
        """Write what `load_codes` reads."""
        row, lane = token // TOGETHER, token % TOGETHER
        byte = 0
        for view in self.codes(pages, which):
            size = view.shape[-1] * view.element_size()
            part = codes[..., byte : byte + size].contiguous().view(view.dtype)
            view[block, :, row, lane] = part
            byte += size

    def scales(self, heads: torch.Tensor, region: Region) -> torch.Tensor:
        """View of one region of scales: (..., block_size, scales) in the scales' dtype.

        Args:
            heads: (..., head_bytes) uint8, last dimension contiguous.
        """
        if not region.width:  # torch cannot reinterpret an empty last dimension
            return heads.new_empty((*heads.shape[:-1], self.block_size, 0), dtype=SCALE_DTYPE)
        area = heads[..., region.offset : region.offset + region.width * self.block_size]
        return area.unflatten(-1, (self.block_size, region.width)).view(SCALE_DTYPE)
