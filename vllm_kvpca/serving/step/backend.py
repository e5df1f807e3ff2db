"""The attention backend that vLLM selects for full-attention layers."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.serving.step.archive_layer import PagedBackend
from vllm_kvpca.serving.step.attention import KvpcaAttentionImpl


class KvpcaBackend(PagedBackend):
    """Backend of the attention layers themselves, whose pages are the recent tier."""

    @staticmethod
    def get_impl_cls() -> type[Any]:
        return KvpcaAttentionImpl
