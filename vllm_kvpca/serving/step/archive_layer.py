"""The second cache owner of a compressed attention layer.

vLLM asks every `AttentionLayerBase` in `static_forward_context` for one cache spec. Our
attention layers keep their place with the recent spec; an `ArchiveLayer` beside each of
them owns the archive spec.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import AttentionBackend, MultipleOf
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.block_sizes import BLOCK_STEP
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.serving.cache.specs import ArchiveSpec
from vllm_kvpca.serving.observe.times import ArchiveTimer
from vllm_kvpca.serving.step.builder import KvpcaMetadataBuilder


class PagedBackend(AttentionBackend):
    """What vLLM needs to know of our pages, of either tier."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        # A name of our own would be unknown to spawned processes, which unpickle the
        # configuration before they load plugins.
        return "CUSTOM"

    @staticmethod
    def get_builder_cls() -> type[KvpcaMetadataBuilder]:
        return KvpcaMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(BLOCK_STEP)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Each head's part of a page must be one run of bytes (pages.layout).
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return False


class CompressedImpl:
    """An attention implementation of ours, as the rest of this room knows it."""

    archive: ArchiveLayer | None = None
    softmax: Softmax
    num_heads: int
    num_kv_heads: int
    head_size: int
    vllm_config: Any


class ArchiveLayer(torch.nn.Module, AttentionLayerBase):
    """Owns one layer's archive pages, codec, and its share of the worker's memory.

    Attributes:
        codec: with the layout of the final plan, once `settle` was called.
        shape: query heads, KV heads on this rank, and head_dim.
        workspace: what the ops attend with; None where they need none.
        timer: of the engine; the first layer's archiving is timed and stands for all.
    """

    kv_sharing_target_layer_name = None

    def __init__(
        self,
        spec: Callable[[], ArchiveSpec],
        codec: LayerCodec,
        shape: tuple[int, int, int],
        timer: ArchiveTimer,
    ) -> None:
        super().__init__()
        self.kv_cache = torch.tensor([])  # vLLM binds the pages here
        self._spec = spec
        self.shape = shape
        self.workspace: Any = None
        self.timer = timer
        self.timed = timer.layers == 0
        timer.layers += 1
        self.codec = codec
        # Buffers survive sleep level 2, which drops all other memory of a model. They are no part
        # of its checkpoint.
        for name, matrix in codec.matrices().items():
            self.register_buffer(name, matrix, persistent=False)

    def get_attn_backend(self) -> type[PagedBackend]:
        return PagedBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> ArchiveSpec:
        return self._spec()

    def settle(self, plan: LayerPlan) -> None:
        """Take the plan with the block sizes that vLLM has settled on."""
        self.codec = self.codec.with_layout(plan.archive)

    def cache(self, recent: torch.Tensor) -> LayerCache:
        """The layer's pages of both tiers, as the ops want them.

        Args:
            recent: the attention layer's pages.
        """
        return LayerCache(recent, self.kv_cache.view(torch.uint8).flatten(2), self.codec)
