"""The managers of both groups' blocks, in vLLM's scheduler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec


class _GroupManager(SingleTypeKVCacheManager):
    """What both managers share: they count the blocks in use."""

    def __init__(self, kv_cache_spec: KVCacheSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.policy: Policy = kv_cache_spec.policy
        """Kept, because every step asks for every sequence."""
        self.held: Counter[int] = Counter()
        """Blocks in use by id, with the number of sequences that use each."""
        self.uses = 0
        """The sum of those numbers."""

    def _hold(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            if not block.is_null:
                self.held[block.block_id] += 1
                self.uses += 1

    def _release(self, blocks: Iterable[KVCacheBlock]) -> None:
        for block in blocks:
            if not block.is_null:
                self.uses -= 1
                self.held[block.block_id] -= 1
                if not self.held[block.block_id]:
                    del self.held[block.block_id]

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        self._hold(self.req_to_blocks[request_id])

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        self._release(blocks)
        return blocks

    def _has_partial_local_hit(
        self, new_computed_blocks: Sequence[KVCacheBlock], num_local_computed_tokens: int
    ) -> bool:
        """No block of a hit is ever written again: an archive ends with a whole block, and the
        raw block in which it ends is not part of the hit."""
        return False

    @classmethod
    def find_longest_cache_hit(cls, *args: Any, **kwargs: Any) -> Any:
        """Not for one group alone: PairCoordinator searches pairs."""
        raise NotImplementedError("vLLM's own coordinator was asked for a compressed layer's hit")


class RecentManager(_GroupManager):
    """Blocks of a recent group: allocated for a step's tail only, freed below the boundary."""

    def __init__(self, kv_cache_spec: RecentSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._freed_below: dict[str, int] = {}
        """First block index of a request that has not been looked at for freeing."""
        self._hit_ends_in: dict[str, int] = {}
        """Row of a request's raw block in which its archived hit ends: its first slots stay empty,
        so the block is never cached."""

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        return self.policy.boundary(num_computed_tokens)

    def _new_rows(self, held: int, num_tokens: int, num_tokens_main_model: int) -> Iterator[bool]:
        """For each row to append: whether it needs a block, or stays null because its
        tokens are archived within the same step."""
        first = self.policy.boundary(num_tokens_main_model) // self.block_size
        return (row >= first for row in range(held, cdiv(num_tokens, self.block_size)))

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        rows = self.req_to_blocks.get(request_id, ())
        if num_tokens <= len(rows) * self.block_size and not new_computed_blocks:
            return 0  # most steps of a decoding sequence
        hits = [block for block in new_computed_blocks if not block.is_null]
        evictable = self._get_num_evictable_blocks(hits)
        if apply_admission_cap:
            held = len(hits) + sum(not block.is_null for block in rows)
            # A hit may be archived beyond the boundary: its null rows stay null.
            null = len(new_computed_blocks) + len(rows) - held
            peak = self.kv_cache_spec.peak_blocks(num_tokens)
            peak = min(peak, cdiv(num_tokens, self.block_size) - null)
            return max(0, peak - held) + evictable
        held_rows = max(len(rows), len(new_computed_blocks))
        return sum(self._new_rows(held_rows, num_tokens, num_tokens_main_model)) + evictable

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        rows = self.req_to_blocks[request_id]
        if num_tokens <= len(rows) * self.block_size:
            return []
        plan = list(self._new_rows(len(rows), num_tokens, num_tokens_main_model))
        blocks = iter(self.block_pool.get_new_blocks(sum(plan)) if any(plan) else ())
        new = [next(blocks) if needed else self._null_block for needed in plan]
        rows.extend(new)
        self._hold(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new if not block.is_null)
        return new

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        # The base class stops at the first null block; ours may lie between real ones.
        rows = self.req_to_blocks.get(request_id)
        if not rows:
            return
        first = self._freed_below.get(request_id, 0)
        last = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        last = min(last, len(rows))
        freed = []
        for row in range(last - 1, first - 1, -1):
            if not rows[row].is_null:
                freed.append(rows[row])
                rows[row] = self._null_block
        if freed:
            self._release(freed)
            self.block_pool.free_blocks(freed)
        self._freed_below[request_id] = max(first, last)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, *args, **kwargs
        )
        if num_local_computed_tokens % self.block_size:
            self._hit_ends_in[request_id] = num_local_computed_tokens // self.block_size

    def cache_blocks(self, request: Any, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        row = self._hit_ends_in.get(request.request_id)
        if row is not None and num_tokens >= (row + 1) * self.block_size:
            del self._hit_ends_in[request.request_id]
            self.num_cached_block[request.request_id] = row + 1  # passed over
        super().cache_blocks(request, num_tokens, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._freed_below.pop(request_id, None)
        self._hit_ends_in.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class ArchiveManager(_GroupManager):
    """Blocks of the archive group: allocated up to the boundary, held until the request ends."""

    def __init__(self, kv_cache_spec: ArchiveSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.archived_tokens = 0
        """Tokens archived since the engine started."""
        self.archive_operations = 0
        """Steps in which a sequence archived, over all sequences."""
        self.sequences = 0
        """Sequences that hold archive blocks."""
        self.ended: dict[str, int] = {}
        """Archived tokens of requests that gave their blocks back; cache_stats empties it."""

    def _missing(self, num_tokens: int, held: int) -> int:
        archived = self.policy.boundary(num_tokens)
        return max(0, cdiv(archived, self.block_size) - held)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        held = len(self.req_to_blocks.get(request_id, ()))
        if not new_computed_blocks:
            return self._missing(num_tokens_main_model, held)
        evictable = self._get_num_evictable_blocks(new_computed_blocks)
        return self._missing(num_tokens_main_model, max(held, len(new_computed_blocks))) + evictable

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        rows = self.req_to_blocks[request_id]
        missing = self._missing(num_tokens_main_model, len(rows))
        if not missing:
            return []
        new = self.block_pool.get_new_blocks(missing)
        self.archived_tokens += missing * self.block_size
        self.archive_operations += 1
        self.sequences += not rows
        rows.extend(new)
        self._hold(new)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in new)
        return new

    def add_local_computed_blocks(self, request_id: str, *args: Any, **kwargs: Any) -> None:
        super().add_local_computed_blocks(request_id, *args, **kwargs)
        self.sequences += bool(self.req_to_blocks[request_id])

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        blocks = super().pop_blocks_for_free(request_id)
        self.sequences -= bool(blocks)
        # A request that is preempted and ends before it runs again holds nothing the second time.
        if blocks or request_id not in self.ended:
            self.ended[request_id] = len(blocks) * self.block_size
        return blocks

    def cache_blocks(
        self,
        request: Any,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        # Every block we hold is archived once the step has run, however many tokens vLLM counts.
        archived = len(self.req_to_blocks[request.request_id]) * self.block_size
        archived = min(archived, request.num_tokens)
        super().cache_blocks(
            request, archived, retention_interval, replay_boundaries=replay_boundaries
        )


def register_specs() -> None:
    """Tell vLLM which manager serves which spec. Safe to call again."""
    # vLLM registers its own specs lazily, and only while the registry is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(RecentSpec, RecentManager, RecentSpec)
    KVCacheSpecRegistry.register(ArchiveSpec, ArchiveManager, ArchiveSpec)
