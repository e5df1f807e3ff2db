"""Entry point of the group `vllm.general_plugins`: vLLM calls it in every process."""

from __future__ import annotations

BACKEND_PATH = "vllm_kvpca.serving.step.backend.KvpcaBackend"


def register() -> None:
    """Make the backend, the cache groups and the flags known. Safe to call again."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    from vllm_kvpca.serving.adapters import patches
    from vllm_kvpca.serving.cache.managers import register_specs

    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    register_specs()
    patches.apply()
