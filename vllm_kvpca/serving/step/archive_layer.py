"""The second cache owner of a compressed attention layer.

vLLM asks every `AttentionLayerBase` in `static_forward_context` for one cache spec. Our
attention layers keep their place with the recent spec; an `ArchiveLayer` beside each of
them owns the archive spec.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.serving.cache.specs import ArchiveSpec
from vllm_kvpca.serving.observe.times import ArchiveTimer


class ArchiveLayer(torch.nn.Module, AttentionLayerBase):
    """Owns one layer's archive pages, codec, and its share of the worker's memory.

    Attributes:
        codec: with the layout of the final plan, once `settle` was called.
        workspace: what the ops attend with; None where they need none.
        timer: of the engine; the first layer's archiving is timed and stands for all.
    """

    kv_sharing_target_layer_name = None

    def __init__(
        self, spec: ArchiveSpec, codec: LayerCodec, num_heads: int, timer: ArchiveTimer
    ) -> None:
        super().__init__()
        self.kv_cache = torch.tensor([])  # vLLM binds the pages here
        self.spec = spec
        self.num_heads = num_heads
        self.workspace: Any = None
        self.timer = timer
        self.timed = timer.layers == 0
        timer.layers += 1
        self.codec = codec
        self.plan = spec.plan
        # Buffers survive sleep level 2, which drops all other memory of a model. They are no part
        # of its checkpoint.
        for name, matrix in codec.matrices().items():
            self.register_buffer(name, matrix, persistent=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Query heads, KV heads on this rank, and head_dim."""
        return self.num_heads, self.spec.num_kv_heads, self.plan.head_dim

    def get_attn_backend(self) -> Any:
        from vllm_kvpca.serving.step.backend import ArchiveBackend

        return ArchiveBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> ArchiveSpec:
        return self.spec

    def settle(self, plan: LayerPlan) -> None:
        """Take the plan with the block sizes that vLLM has settled on."""
        self.plan = plan
        self.codec = self.codec.with_layout(plan.archive)

    def cache(self, recent: torch.Tensor) -> LayerCache:
        """The layer's pages of both tiers, as the ops want them.

        Args:
            recent: the attention layer's pages.
        """
        return LayerCache(recent, self.kv_cache.view(torch.uint8).flatten(2), self.codec)
