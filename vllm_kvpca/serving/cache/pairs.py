"""Which recent and which archive group serve the same layers.

vLLM splits the layers of a kind into groups of equal size, so there may be several pairs.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.kv_cache_interface import KVCacheGroupSpec

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.serving.cache.prefix_hits import Pair
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec

ARCHIVE_SUFFIX = ".kvpca_archive"
"""Name of an attention layer's archive, behind the layer's own name."""


def find_pairs(groups: Sequence[KVCacheGroupSpec]) -> list[Pair]:
    """The pairs among a model's cache groups.

    Raises:
        UnsupportedError: vLLM has grouped archives other than their layers.
    """
    archives = {
        frozenset(group.layer_names): index
        for index, group in enumerate(groups)
        if isinstance(group.kv_cache_spec, ArchiveSpec)
    }
    pairs, alone = [], []
    for index, group in enumerate(groups):
        spec = group.kv_cache_spec
        if isinstance(spec, RecentSpec):
            names = frozenset(name + ARCHIVE_SUFFIX for name in group.layer_names)
            archive = archives.pop(names, None)
            if archive is not None:
                pairs.append(Pair(index, archive, spec.block_size, spec.policy))
            else:
                alone.append(index)
    if archives or alone:
        raise UnsupportedError(
            "this vLLM groups the archives of compressed layers other than the layers "
            "themselves: serve this model without --kv-compression-preset."
        )
    return pairs
