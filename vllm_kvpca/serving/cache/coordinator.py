"""vLLM's coordinator of cache groups, for models with compressed layers.

It differs from vLLM's in what is asked for a prefix-cache hit. vLLM asks group after group,
each for blocks that are all of one size, in steps of the least common multiple of all block
sizes. A pair of recent and archive groups can only answer together, and in finer steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from vllm.utils.math_utils import round_down
from vllm.v1.core.kv_cache_coordinator import HybridKVCacheCoordinator, SpecGroup
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from vllm_kvpca.serving.cache.pairs import find_pairs
from vllm_kvpca.serving.cache.prefix_hits import PairSearch, agreed
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec


def is_compressed(groups: Sequence[KVCacheGroupSpec]) -> bool:
    """Whether any of a model's cache groups is an archive."""
    return any(isinstance(group.kv_cache_spec, ArchiveSpec) for group in groups)


def hit_step(groups: Sequence[KVCacheGroupSpec]) -> int:
    """Tokens whose multiples are the lengths of hits that vLLM's own groups can give: their blocks
    are whole there, and Mamba layers have kept a state. Pairs ask for no step."""
    specs = [group.kv_cache_spec for group in groups]
    own = (spec for spec in specs if not isinstance(spec, RecentSpec | ArchiveSpec))
    return math.lcm(*(spec.block_size for spec in own if spec.prefix_cacheable))


class PairCoordinator(HybridKVCacheCoordinator):
    """Groups of vLLM's own kinds, and pairs of recent and archive groups beside them.

    Speculative decoding is refused with compression (serving.settings), so no group has to
    drop a block at the end of a hit.
    """

    def __init__(self, kv_cache_config: KVCacheConfig, **kwargs: Any) -> None:
        groups = kv_cache_config.kv_cache_groups
        self.pairs = find_pairs(groups)
        paired = {group for pair in self.pairs for group in (pair.recent, pair.archive)}
        self._paired = paired
        self._step = hit_step(groups)
        # Hits within a block need managers that can copy one, in all groups.
        super().__init__(kv_cache_config, **{**kwargs, "allow_partial_hash_hits": False})

    @property
    def _cache_hit_alignment_tokens(self) -> int:
        return self._step

    def _align_cacheable(self, num_tokens: int) -> int:
        return round_down(num_tokens, self._step)

    def get_num_cacheable_tokens(self, num_computed_tokens: int, kv_cache_group_id: int) -> int:
        """Every whole block of a pair may be part of a later hit."""
        if kv_cache_group_id in self._paired:
            return num_computed_tokens
        return super().get_num_cacheable_tokens(num_computed_tokens, kv_cache_group_id)

    def find_longest_cache_hit(
        self, block_hashes: list[Any], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """The longest prefix that all groups still hold; see the base class."""
        found: dict[int, list[KVCacheBlock]] = {}
        asked = (block_hashes, self.block_pool, max_cache_hit_length)
        searches = [PairSearch(pair, *asked, self._step) for pair in self.pairs]
        holders: list[Callable[[int], int]] = [search.longest for search in searches]
        holders += [
            partial(self._ask, group, block_hashes, found)
            for group in self.attention_groups
            if group.group_ids[0] not in self._paired
        ]
        length, longest = agreed(max_cache_hit_length, holders)
        if not length:
            found.clear()
        for search in searches if length else ():
            recent, archive = search.rows(length)
            found |= {search.pair.recent: recent, search.pair.archive: archive}
        blocks = tuple(found.get(i, []) for i in range(len(self.single_type_managers)))
        return blocks, length, longest - length

    def _ask(
        self,
        group: SpecGroup,
        block_hashes: list[Any],
        found: dict[int, list[KVCacheBlock]],
        limit: int,
    ) -> int:
        """The longest prefix of groups of vLLM's own kinds; their blocks go to `found`."""
        manager = self.single_type_managers[group.group_ids[0]]
        blocks, length = group.manager_cls.find_longest_cache_hit(
            block_hashes=block_hashes,
            max_length=limit,
            kv_cache_group_ids=group.group_ids,
            block_pool=manager.block_pool,
            kv_cache_spec=group.spec,
            drop_eagle_block=False,
            alignment_tokens=self._step,
            dcp_world_size=manager.dcp_world_size,
            pcp_world_size=manager.pcp_world_size,
        )
        found.update(zip(group.group_ids, blocks, strict=True))
        return length
