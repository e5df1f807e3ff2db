"""vLLM's view of one compressed attention layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.pages.layout import raw_token_bytes
from vllm_kvpca.serving.step.device_batch import DeviceStep
from vllm_kvpca.serving.step.layers import ARCHIVE_SUFFIX, ArchiveLayer, attach_archive
from vllm_kvpca.serving.step.run import StepTokens, run_step

if TYPE_CHECKING:
    from vllm_kvpca.serving.step.device_step import DeviceWorkspace


class KvpcaAttentionImpl(AttentionImpl):
    """Attention of one layer; the work itself is in serving.step."""

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
        self.kv_cache_dtype = kv_cache_dtype
        self.soft_cap = logits_soft_cap or None
        self.vllm_config = get_current_vllm_config()
        self.archive: ArchiveLayer | None = None
        self.workspace: DeviceWorkspace | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        # Weights may be loaded again; the second cache owner is attached once.
        if self.archive is None:
            self.archive = attach_archive(self, self.vllm_config)
            if current_platform.is_cuda():
                self._prepare_device()

    def _prepare_device(self) -> None:
        from vllm_kvpca.serving.step.flash import flash_version
        from vllm_kvpca.serving.step.warm_up import compile_kernels
        from vllm_kvpca.serving.step.workspace import workspace_for

        assert self.archive is not None
        flash_version(self.head_size, self.soft_cap is not None)
        codec, spec = self.archive.codec, self.archive.spec
        self.workspace = workspace_for(self, codec.dtype, torch.device("cuda"))
        compile_kernels(
            codec,
            spec.page_bytes // (self.num_kv_heads * raw_token_bytes(self.head_size)),
            spec.policy,
            self.num_heads,
            self.num_kv_heads,
            self.soft_cap,
            self.workspace,
        )

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
        tokens = StepTokens(query, key, value, output)
        pages = self.archive.pages()
        codec = self.archive.codec
        if isinstance(step, DeviceStep):
            self._run_on_device(step, tokens, kv_cache, pages)
        else:
            run_step(step, tokens, kv_cache, pages, codec, self.scale, self.soft_cap)
        return output

    def _run_on_device(
        self, step: DeviceStep, tokens: StepTokens, recent: torch.Tensor, pages: torch.Tensor
    ) -> None:
        from vllm_kvpca.serving.step.device_step import LayerCache, run_device_step
        from vllm_kvpca.serving.step.flash import causal_varlen

        assert self.archive is not None and self.workspace is not None
        run_device_step(
            step,
            tokens,
            LayerCache(recent, pages, self.archive.codec),
            self.workspace,
            causal_varlen,
            self.scale,
            self.soft_cap,
        )
