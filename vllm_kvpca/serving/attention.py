"""One compressed attention layer: store raw, archive, attend over three parts."""

from __future__ import annotations

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_kvpca import kernels
from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.kernels.reference import load_recent
from vllm_kvpca.serving.batch import Bucket, Step
from vllm_kvpca.serving.layers import ARCHIVE_SUFFIX, ArchiveLayer, attach_archive


class KvpcaAttentionImpl(AttentionImpl):
    """Attention of one layer.

    Order inside a step: raw tokens are stored, then what leaves the window is archived,
    then everybody attends. A prefix hit in the same step may read the archive at once.
    """

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
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.group = self.num_heads // self.num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = logits_soft_cap or None
        self.vllm_config = get_current_vllm_config()
        self.archive: ArchiveLayer | None = None

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
        assert self.archive is not None
        metadata = get_forward_context().attn_metadata
        step = attn_metadata.step(metadata[layer.layer_name + ARCHIVE_SUFFIX])
        pages = self.archive.pages()
        kernels.store(kv_cache, key, value, step.store_slots)
        if step.archive is not None:
            self._archive(step, key, value, kv_cache, pages)
        for bucket in step.buckets:
            self._attend(bucket, query, key, value, kv_cache, pages, output)
        return output

    def _archive(
        self,
        step: Step,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        pages: torch.Tensor,
    ) -> None:
        assert self.archive is not None and step.archive is not None
        old_key, old_value = load_recent(kv_cache, step.archive.recent_slots)
        kernels.archive(
            pages,
            torch.cat([old_key, key[step.archive.new_tokens]]),
            torch.cat([old_value, value[step.archive.new_tokens]]),
            step.archive.slots,
            self.archive.codec,
        )

    def _attend(
        self,
        bucket: Bucket,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        pages: torch.Tensor,
        output: torch.Tensor,
    ) -> None:
        assert self.archive is not None
        batch, queries = bucket.tokens.shape
        # (batch, kv_heads, queries * group, head_dim)
        q = query[bucket.tokens].float()
        q = q.view(batch, queries, self.num_kv_heads, self.group, self.head_size)
        q = q.transpose(1, 2).flatten(2, 3)
        k, v = (x[bucket.tokens].float().transpose(1, 2) for x in (key, value))
        part = kernels.attend_new(q, k, v, self.group, self.scale, self.soft_cap)
        if bucket.recent_table is not None:
            recent = kernels.attend_recent(
                q, kv_cache, bucket.recent_table, bucket.recent_lengths, self.scale, self.soft_cap
            )
            part = kernels.merge(part, recent)
        if bucket.archive_table is not None:
            archived = kernels.attend_archive(
                q,
                pages,
                bucket.archive_table,
                bucket.archive_lengths,
                self.archive.codec,
                self.scale,
                self.soft_cap,
            )
            part = kernels.merge(part, archived)
        out = part.out.view(batch, self.num_kv_heads, queries, self.group, self.head_size)
        out = out.transpose(1, 2).flatten(2, 3)
        output[bucket.tokens[bucket.valid]] = out[bucket.valid].to(output.dtype)
