"""The two cache specs of a compressed attention layer.

RecentSpec holds raw tokens and behaves like a sliding window; ArchiveSpec holds archived tokens
and behaves like full attention. Both carry the layer's plan: archive [0, boundary(n)), recent
[boundary(n), n). Pages of both have equal bytes, so vLLM's block pool serves them alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    """

    block_size: int
    planned: LayerPlan

    if TYPE_CHECKING:  # of the vLLM spec beside it: its other fields must keep their defaults

        @property
        def page_size_bytes(self) -> int: ...

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

    def decoding_blocks(self, num_tokens: int) -> int:
        """Most blocks of this group that it holds while it decodes."""
        raise NotImplementedError

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Bytes of one layer for one sequence of max_model_len tokens.

        vLLM asks twice. First, what a pool must hold so that one sequence can always go on: the
        peak, with the raw blocks that wait while a prompt is archived. Then, once it knows the
        number of blocks, how many sequences fit: few of them are in that state at a time.
        """
        longest = vllm_config.model_config.max_model_len
        known = vllm_config.cache_config.num_gpu_blocks is not None
        blocks = self.decoding_blocks(longest) if known else self.peak_blocks(longest)
        return blocks * self.page_size_bytes


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

    def decoding_blocks(self, num_tokens: int) -> int:
        archived = self.policy.boundary(num_tokens) // self.policy.align
        return decoding_blocks(self.policy, self.block_size, num_tokens) - archived


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

    def decoding_blocks(self, num_tokens: int) -> int:
        return self.peak_blocks(num_tokens)

    @classmethod
    def merge(cls, specs: list[ArchiveSpec]) -> ArchiveSpec:
        # FullAttentionSpec.merge rebuilds the spec from its own fields and would lose ours.
        return KVCacheSpec.merge.__func__(cls, specs)
