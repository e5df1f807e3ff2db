"""The two cache specs of a compressed attention layer.

RecentSpec holds raw tokens and behaves like a sliding window; ArchiveSpec holds archived tokens
and behaves like full attention. Both carry the layer's plan: archive [0, boundary(n)), recent
[boundary(n), n). Pages of both have equal bytes, so vLLM's block pool serves them alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

from vllm_kvpca.pages.block_sizes import decoding_blocks, peak_raw_blocks
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layer_plan import LayerPlan


@dataclass(frozen=True, kw_only=True)
class _PlannedSpec:
    """What both specs know of the layer.

    Attributes:
        planned: as it was before vLLM equalized pages with layers of other kinds; `plan` is what
            counts.
        max_model_len: tokens.
    """

    block_size: int
    planned: LayerPlan
    max_model_len: int

    @property
    def plan(self) -> LayerPlan:
        """The layer's plan with the block sizes that vLLM has settled on."""
        return self.planned.scaled(self.block_size // self._planned_block)

    @property
    def policy(self) -> Policy:
        return self.plan.policy

    @property
    def _planned_block(self) -> int:
        raise NotImplementedError

    def peak_blocks(self, num_tokens: int) -> int:
        """Most blocks of this group that one sequence of so many tokens ever holds."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RecentSpec(_PlannedSpec, AttentionSpec):
    """Raw K and V of the tokens in [boundary(n), n)."""

    batches: int = 1
    """Steps in flight at a time (VllmConfig.max_concurrent_batches)."""

    @property
    def _planned_block(self) -> int:
        return self.planned.raw_block

    def peak_blocks(self, num_tokens: int) -> int:
        return peak_raw_blocks(self.policy, self.block_size, num_tokens, self.batches)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """What a decoding sequence holds; the tails that prefill leaves for a moment are in
        `peak_blocks`, which admission and the check at start go by."""
        longest = vllm_config.model_config.max_model_len
        archived = self.policy.boundary(longest) // self.policy.align
        blocks = decoding_blocks(self.policy, self.block_size, longest) - archived
        return blocks * self.page_size_bytes


@dataclass(frozen=True, kw_only=True)
class ArchiveSpec(_PlannedSpec, FullAttentionSpec):
    """Archived tokens in [0, boundary(n)).

    A FullAttentionSpec, because vLLM's coordinator asks full attention first for
    prefix-cache hits. `state_content_size_bytes` is what the archive layout holds per token and
    head; the page is padded to that of the raw block.
    """

    def __post_init__(self) -> None:
        object.__setattr__(self, "state_content_bytes", self.planned.archive.content_bytes)
        super().__post_init__()
        wanted = self.plan.head_page_bytes * self.num_kv_heads
        padded = max(wanted, self.page_size_padded or 0)
        object.__setattr__(self, "page_size_padded", padded)

    @property
    def _planned_block(self) -> int:
        return self.planned.archive_block

    def peak_blocks(self, num_tokens: int) -> int:
        return cdiv(self.policy.boundary(num_tokens), self.block_size)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        return self.peak_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes

    @classmethod
    def merge(cls, specs: list[ArchiveSpec]) -> ArchiveSpec:
        # FullAttentionSpec.merge rebuilds the spec from its own fields and would lose ours.
        return KVCacheSpec.merge.__func__(cls, specs)
