"""The attention backend that vLLM selects for full-attention layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
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
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import KVCacheLayout

from vllm_kvpca.pages.block_sizes import BLOCK_STEP
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.step.attention import KvpcaAttentionImpl
from vllm_kvpca.serving.step.batch import Step, StepInput, plan_step
from vllm_kvpca.serving.step.device_batch import DeviceStep, PrefillGroup, group_prefills, on_device
from vllm_kvpca.serving.step.workspace import context_tokens


class KvpcaBackend(AttentionBackend):
    """Backend of the attention layers themselves (group R)."""

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
    """Backend of the archive pages (group C): it only brings their block table."""


@dataclass
class KvpcaMetadata(AttentionMetadata):
    """One group's view of a step; tensors as vLLM passes them.

    On a GPU the recent group also carries the step's plan, all but the archive's table.
    """

    query_start: torch.Tensor
    lengths: torch.Tensor
    block_table: torch.Tensor
    spec: RecentSpec | ArchiveSpec
    plan: DeviceStep | None = None
    _step: Step | DeviceStep | None = None

    def step(self, archive: KvpcaMetadata) -> Step | DeviceStep:
        """The step's work for both groups; put together by the first layer that asks."""
        if self._step is None:
            if self.plan is not None:
                self._step = replace(self.plan, archive_table=archive.block_table)
            else:
                self._step = self._host_step(archive)
        return self._step

    def _host_step(self, archive: KvpcaMetadata) -> Step:
        step = StepInput(
            query_start=self.query_start.cpu(),
            lengths=self.lengths.cpu(),
            recent_table=self.block_table.cpu(),
            archive_table=archive.block_table.cpu(),
            recent_block=self.spec.block_size,
            archive_block=archive.spec.block_size,
            policy=self.spec.policy,
        )
        return plan_step(step).to(self.block_table.device)


class KvpcaMetadataBuilder(AttentionMetadataBuilder[KvpcaMetadata]):
    """Builds the metadata of either group."""

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
        self.spec = kv_cache_spec
        if device.type == "cuda":  # decodes first, so that one kernel serves them all
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=False)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> KvpcaMetadata:
        common = common_attn_metadata
        plan = None
        if isinstance(self.spec, RecentSpec) and self.device.type == "cuda":
            plan = self._plan(common)
        return KvpcaMetadata(
            common.query_start_loc, common.seq_lens, common.block_table_tensor, self.spec, plan
        )

    @cached_property
    def _buffers(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Starts and list of a step, for all steps: CUDA graphs read them at fixed addresses."""
        sequences = self.vllm_config.scheduler_config.max_num_seqs
        both = torch.zeros(2 * sequences + 1, dtype=torch.int32, device=self.device)
        return both[:sequences], both[sequences:]

    def _plan(self, common: Any) -> DeviceStep:
        from vllm_kvpca.ops.starts.kernel import list_busy, starts

        rows = common.num_reqs
        query_start, lengths = common.query_start_loc[: rows + 1], common.seq_lens[:rows]
        table = common.block_table_tensor[:rows]
        every_start, busy = self._buffers
        out = every_start[:rows]
        starts(query_start, lengths, table, self.spec.block_size, self.spec.policy, out)
        list_busy(out, lengths, self.spec.policy, busy)
        decodes, prefills, _, _ = split_decodes_and_prefills(common)
        groups: tuple[PrefillGroup, ...] = ()
        if prefills:
            # Exact for prefilling sequences, and no wait for the device.
            groups = group_prefills(
                common.query_start_loc_cpu.tolist(),
                common.seq_lens_cpu_upper_bound[:rows].tolist(),
                decodes,
                context_tokens(self.vllm_config),
            )
        return DeviceStep(
            policy=self.spec.policy,
            decodes=decodes,
            prefills=tuple(on_device(group, query_start, lengths) for group in groups),
            query_start=query_start,
            lengths=lengths,
            starts=out,
            busy=busy,
            slots=common.slot_mapping,
            recent_table=table,
            archive_table=table,  # the archive's own comes with its group's metadata
        )
