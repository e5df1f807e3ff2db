"""LayerPlan: everything that is decided about the cache of one kind of layer.

It is built once from the whole model's shape, so that every process has the same one: the
scheduler's block managers, each rank's kernels, the metrics. vLLM may scale block sizes when it
equalizes pages with layers of other kinds; `scaled` is the plan that counts from then on, and
nobody keeps sizes of his own.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache

import torch

from vllm_kvpca.codec.bands import Band
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layout import ArchiveLayout, raw_token_bytes

LAYOUT_VERSION = 2
"""Raised whenever the same tokens would be archived as other bytes (see pages.layout)."""


@dataclass(frozen=True)
class Stream:
    """One tensor that a layer stores per token and head.

    Attributes:
        name: "k" or "v".
        width: components of one head's vector.
        bands: how they are archived.
        basis: its name, or for fitted ones a digest of the matrices of all layers.
    """

    name: str
    width: int
    bands: tuple[Band, ...]
    basis: str


@dataclass(frozen=True)
class LayerPlan:
    """What a kind of layer stores, and how.

    Attributes:
        streams: K's and V's, in this order.
        dtype: of raw tokens and of 16-bit bands.
        raw_block, archive_block: tokens per block; pages of both have equal bytes.
        compress_after, keep_recent: tokens; see pages.boundary.
        kv_heads: of one rank; a page holds them all.
        model: what says whose tokens these are.
    """

    streams: tuple[Stream, ...]
    dtype: torch.dtype
    raw_block: int
    archive_block: int
    compress_after: int
    keep_recent: int
    kv_heads: int = 1
    model: str = ""

    @property
    def head_dim(self) -> int:
        return self.streams[0].width

    @cached_property
    def policy(self) -> Policy:
        """The boundary moves by whole archive blocks."""
        return Policy(self.compress_after, self.keep_recent, self.archive_block)

    @cached_property
    def archive(self) -> ArchiveLayout:
        """One head's part of an archive page."""
        k, v = self.streams
        return ArchiveLayout(self.head_dim, self.archive_block, k.bands, v.bands)

    @property
    def raw_token_bytes(self) -> int:
        """Of one raw token and head: K and V."""
        return raw_token_bytes(self.head_dim)

    @property
    def head_page_bytes(self) -> int:
        """One head's part of a page of either tier, padding included."""
        return self.raw_block * self.raw_token_bytes

    @lru_cache(64)  # noqa: B019  # plans are few, and every spec asks often
    def scaled(self, factor: int) -> LayerPlan:
        """The plan with pages of `factor` times as many bytes."""
        if factor == 1:
            return self
        return replace(
            self,
            raw_block=self.raw_block * factor,
            archive_block=self.archive_block * factor,
        )

    @cached_property
    def cache_id(self) -> str:
        """Hash of all that gives a page's bytes their meaning: two caches may exchange pages only
        if theirs are equal. 16 hexadecimal digits."""
        meaning = {
            "layout": LAYOUT_VERSION,
            "streams": [asdict(stream) for stream in self.streams],
            "dtype": str(self.dtype),
            "blocks": [self.raw_block, self.archive_block],
            "kv_heads": self.kv_heads,
            "model": self.model,
        }
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]
