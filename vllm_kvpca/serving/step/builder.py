"""What vLLM's runner builds for both cache groups in every step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
)

from vllm_kvpca.ops.table import ops_for
from vllm_kvpca.pages.step_plan import StepPlan
from vllm_kvpca.serving.cache.pairs import ARCHIVE_SUFFIX
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.step.plan import StepPlanner, context_tokens


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
