"""The transformers side: a cache for `model.generate` that stores K and V compressed."""

from vllm_kvpca.hf_cache.cache import MemoryStats, PresetCache, load_preset_cache

__all__ = ["MemoryStats", "PresetCache", "load_preset_cache"]
