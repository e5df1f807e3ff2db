"""Chunked-local layers keep vLLM's own backend; vLLM selects one as for full attention."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.serving.adapters.changes import Patch, Wrap
from vllm_kvpca.serving.adapters.engine_config import BACKEND_KIND
from vllm_kvpca.serving.settings.options import asks_for_compression


def _get_attn_backend(original: Any) -> Any:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from vllm.config import get_current_vllm_config

        config = get_current_vllm_config()
        if not asks_for_compression(config):
            return original(*args, **kwargs)
        chosen = config.attention_config
        kinds = chosen.backend_per_kind
        chosen.backend_per_kind = {k: v for k, v in kinds.items() if k != BACKEND_KIND}
        try:
            return original(*args, **kwargs)
        finally:
            chosen.backend_per_kind = kinds

    return wrapper


PATCH = Patch(
    title="chunked-local layers",
    why="vLLM knows no kind of attention for chunked-local layers when it selects their backend.",
    how="`get_attn_backend`, where such a layer asks for it, does not answer our backend.",
    waits_for="a kind of its own for them in `backend_per_kind`",
    fails="A refusal: chunked-local layers are no plain full attention.",
    changes=(
        Wrap(
            "vllm.model_executor.layers.attention.chunked_local_attention:get_attn_backend",
            _get_attn_backend,
            ("head_size", "dtype", "kv_cache_dtype"),
        ),
    ),
)
