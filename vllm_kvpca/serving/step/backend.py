"""The attention backend that vLLM selects for full-attention layers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvpca.ops.table import ops_for
from vllm_kvpca.pages.block_sizes import BLOCK_STEP
from vllm_kvpca.pages.step_plan import StepPlan
from vllm_kvpca.serving.cache.pairs import ARCHIVE_SUFFIX
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.step.attention import KvpcaAttentionImpl
from vllm_kvpca.serving.step.plan import StepPlanner, context_tokens


class KvpcaBackend(AttentionBackend):
    """Backend of the attention layers themselves, whose pages are the recent tier."""

    forward_includes_kv_cache_update = True
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.bfloat16, torch.float16]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "bfloat16", "float16"]

    @staticmethod
    def get_name() -> str:
        # A name of our own would be unknown to spawned processes, which unpickle the
        # configuration before they load plugins.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[KvpcaAttentionImpl]:
        return KvpcaAttentionImpl

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


class ArchiveBackend(KvpcaBackend):
    """Backend of the archive pages: it only brings their block table."""


@dataclass
class KvpcaMetadata(AttentionMetadata):
    """One group's view of a step.

    Attributes:
        block_table: (sequences, width) int32.
        plan: the step's plan, all but the archive's table; of recent groups only.
    """

    block_table: torch.Tensor
    plan: StepPlan | None = None
    _steps: dict[int, StepPlan] = field(default_factory=dict)

    def step(self, archive: KvpcaMetadata) -> StepPlan:
        """The plan for both groups; put together by the first layer that asks."""
        step = self._steps.get(id(archive))
        if step is None:
            assert self.plan is not None, "archive pages are planned with their recent ones"
            table = archive.block_table[: len(self.plan.lengths)]
            step = replace(self.plan, archive_table=table, _shared={})
            self._steps[id(archive)] = step
        return step


class KvpcaMetadataBuilder(AttentionMetadataBuilder[KvpcaMetadata]):
    """Builds the metadata of either group, once vLLM's cache configuration is final."""

    _cudagraph_support = (
        AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
        if current_platform.is_cuda()
        else AttentionCGSupport.NEVER
    )

    def __init__(
        self,
        kv_cache_spec: RecentSpec | ArchiveSpec,
        layer_names: list[str],
        vllm_config: Any,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._planner: StepPlanner | None = None
        if isinstance(kv_cache_spec, RecentSpec):
            self._planner = self._settle(kv_cache_spec)
        if device.type == "cuda":  # decodes first, so that one kernel serves them all
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)

    def _settle(self, spec: RecentSpec) -> StepPlanner:
        """Give the group's layers their final plan, and compile what they need for it."""
        context = self.vllm_config.compilation_config.static_forward_context
        sequences = self.vllm_config.scheduler_config.max_num_seqs
        chunks = None
        for name in self.layer_names:
            archive, impl = context[name + ARCHIVE_SUFFIX], context[name].impl
            archive.settle(spec.plan)
            if self.device.type == "cuda":
                from vllm_kvpca.ops.attend.decode import make_chunks
                from vllm_kvpca.serving.step.warm_up import compile_kernels

                chunks = chunks or make_chunks(archive.workspace.decode, sequences)
                compile_kernels(
                    spec.plan,
                    archive.codec,
                    impl.num_heads,
                    impl.num_kv_heads,
                    impl.softmax,
                    archive.workspace,
                    sequences,
                    ops_for(self.device),
                )
        return StepPlanner(
            spec.plan, sequences, context_tokens(self.vllm_config), self.device, chunks
        )

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> KvpcaMetadata:
        plan = self._planner.plan(common_attn_metadata) if self._planner else None
        return KvpcaMetadata(common_attn_metadata.block_table_tensor, plan)
