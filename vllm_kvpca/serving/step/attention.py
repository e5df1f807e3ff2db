"""vLLM's view of one compressed attention layer."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.table import ops_for
from vllm_kvpca.pages.step_plan import StepTokens
from vllm_kvpca.serving.cache.pairs import ARCHIVE_SUFFIX
from vllm_kvpca.serving.step.archive_layer import CompressedImpl
from vllm_kvpca.serving.step.attach import attach_archive
from vllm_kvpca.serving.step.run import run_step


class KvpcaAttentionImpl(CompressedImpl, AttentionImpl):
    """Attention of one layer; the work itself is in the ops."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
    ) -> None:
        for wrong, what in (
            (alibi_slopes is not None, "ALiBi slopes"),
            (sliding_window is not None, "a sliding window"),
            (attn_type != AttentionType.DECODER, f"attention type {attn_type}"),
            (kv_sharing_target_layer_name is not None, "a KV cache shared between layers"),
        ):
            if wrong:
                raise UnsupportedError(
                    f"KV compression does not support layers with {what}: "
                    "serve this model without --kv-compression-preset."
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.softmax = Softmax(float(scale), logits_soft_cap or None)
        self.vllm_config = get_current_vllm_config()

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        # Weights may be loaded again; the second cache owner is attached once.
        if self.archive is None:
            self.archive = attach_archive(self, self.vllm_config)

    def forward(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of a step's new tokens.

        Args:
            query, output: (tokens, heads, head_dim); key, value: (tokens, kv_heads, head_dim).
            kv_cache: (blocks, kv_heads, raw_block, 2 * head_dim), the recent pages.
        """
        if attn_metadata is None:  # vLLM profiles memory without a cache
            return output.fill_(0)
        archive = self.archive
        assert archive is not None
        metadata = get_forward_context().attn_metadata
        run_step(
            attn_metadata.step(metadata[layer.layer_name + ARCHIVE_SUFFIX]),
            StepTokens(query, key, value, output),
            archive.cache(kv_cache),
            self.softmax,
            ops_for(query.device),
            archive.workspace,
            archive.timer if archive.timed else None,
        )
        return output
