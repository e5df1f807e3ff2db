"""The cache groups of an engine: checked when vLLM has made them, searched in pairs."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.serving.adapters.changes import Patch, Wrap
from vllm_kvpca.serving.log import contained
from vllm_kvpca.serving.settings.options import asks_for_compression


def _get_kv_cache_coordinator(original: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _searches_pairs(*args, **kwargs):
            from vllm_kvpca.serving.cache.coordinator import PairCoordinator

            return PairCoordinator(*args, **kwargs)
        return original(*args, **kwargs)

    return wrapper


def _searches_pairs(
    kv_cache_config: Any = None, *args: Any, enable_caching: bool = False, **kwargs: Any
) -> bool:
    """Whether prefixes are searched in a cache with archives. Every server comes by here, so
    whatever vLLM passes, nothing is raised; an engine with archives would end at once without
    the search."""
    with contained("looking at the cache groups"):
        from vllm_kvpca.serving.cache.coordinator import is_compressed

        return enable_caching and is_compressed(kv_cache_config.kv_cache_groups)
    return False


def _resolve_cache_hit_alignment_tokens(original: Any) -> Any:
    def wrapper(kv_cache_config: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        if not _searches_pairs(
            kv_cache_config, enable_caching=vllm_config.cache_config.enable_prefix_caching
        ):
            return original(kv_cache_config, vllm_config, *args, **kwargs)
        from vllm_kvpca.serving.cache.coordinator import hit_step

        return hit_step(kv_cache_config.kv_cache_groups)

    return wrapper


def _get_kv_cache_configs(original: Any) -> Any:
    def wrapper(vllm_config: Any, kv_cache_specs: Any, *args: Any, **kwargs: Any) -> Any:
        if not asks_for_compression(vllm_config):
            return original(vllm_config, kv_cache_specs, *args, **kwargs)
        from vllm_kvpca.serving.cache import coverage

        coverage.check_specs(kv_cache_specs)
        with coverage.explained(vllm_config):
            configs = original(vllm_config, kv_cache_specs, *args, **kwargs)
        coverage.log_coverage(vllm_config, configs[0].kv_cache_groups)
        return configs

    return wrapper


PREFIX_HITS = Patch(
    title="prefix hits",
    why="vLLM asks the manager of one cache group at a time for prefix-cache hits, in steps of "
    "the least common multiple of all block sizes; a prefix that is partly archived and partly "
    "raw can only be found in both groups together, and in finer steps.",
    how="`get_kv_cache_coordinator` answers `serving.cache.coordinator.PairCoordinator` for a "
    "model with archives; workers, which keep Mamba's states where hits may end, are told the "
    "same step (`resolve_cache_hit_alignment_tokens`).",
    waits_for="managers that can be asked for several groups together",
    fails="The engine ends while it starts: the managers refuse to search alone.",
    changes=(
        Wrap(
            "vllm.v1.core.kv_cache_manager:get_kv_cache_coordinator",
            _get_kv_cache_coordinator,
            ("kv_cache_config", "max_model_len"),
        ),
        Wrap(
            "vllm.v1.engine.core:resolve_cache_hit_alignment_tokens",
            _resolve_cache_hit_alignment_tokens,
            ("kv_cache_config", "vllm_config"),
        ),
    ),
)

COVERAGE = Patch(
    title="coverage",
    why="Only when vLLM has put all layers into groups is it known what is compressed.",
    how="`get_kv_cache_configs` refuses a model in which nothing is compressed, names "
    "`--num-gpu-blocks-override` where that is what does not fit, and logs what is compressed.",
    waits_for="a hook for general plugins between loading a model and taking its cache",
    fails="A refusal before memory for the cache is taken.",
    changes=(
        Wrap(
            "vllm.v1.engine.core:get_kv_cache_configs",
            _get_kv_cache_configs,
            ("vllm_config", "kv_cache_specs"),
        ),
    ),
)
