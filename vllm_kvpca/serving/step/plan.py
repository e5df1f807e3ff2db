"""A StepPlan from what vLLM says of a step."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_kvpca.ops.table import ops_for
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.pages.step_plan import PrefillGroup, StepPlan, group_prefills


def context_tokens(vllm_config: Any) -> int:
    """Room for the expanded context of prefilling sequences: one of the greatest length."""
    return int(vllm_config.model_config.max_model_len)


class StepPlanner:
    """Makes the plans of one cache group; their tensors keep their addresses, so that CUDA graphs
    find every step in the same place.

    Args:
        plan: of the group's layers.
        max_sequences: of a step.
        room: tokens of context that prefilling sequences may have together.
        chunks: see StepPlan.
    """

    def __init__(
        self,
        plan: LayerPlan,
        max_sequences: int,
        room: int,
        device: torch.device,
        chunks: Any = None,
    ) -> None:
        self._plan, self._room, self._chunks = plan, room, chunks
        self._ops = ops_for(device)
        both = torch.zeros(2 * max_sequences + 1, dtype=torch.int32, device=device)
        self._starts, self._busy = both[:max_sequences], both[max_sequences:]

    def plan(self, common: Any) -> StepPlan:
        """The plan of a step, but for the archive's block table, which another group brings.

        Args:
            common: vLLM's CommonAttentionMetadata of the recent group.
        """
        count = common.num_reqs
        query_start, lengths = common.query_start_loc[: count + 1], common.seq_lens[:count]
        table, starts = common.block_table_tensor[:count], self._starts[:count]
        self._ops.locate(query_start, lengths, table, self._plan, starts, self._busy)
        decodes, prefills = self._split(common, query_start, lengths)
        return StepPlan(
            layer=self._plan,
            query_start=query_start,
            lengths=lengths,
            starts=starts,
            busy=self._busy,
            slots=common.slot_mapping,
            recent_table=table,
            archive_table=table,
            decodes=decodes,
            prefills=prefills,
            chunks=self._chunks,
        )

    def _split(
        self, common: Any, query_start: torch.Tensor, lengths: torch.Tensor
    ) -> tuple[int, tuple[PrefillGroup, ...]]:
        if self._chunks is None:  # the reference attends to all sequences alike
            return 0, ()
        decodes, prefills, _, _ = split_decodes_and_prefills(common)
        if not prefills:
            return decodes, ()
        # Exact for prefilling sequences, and no wait for the device.
        host = common.query_start_loc_cpu.tolist(), common.seq_lens_cpu_upper_bound.tolist()
        groups = group_prefills(
            host[0], host[1][: len(lengths)], decodes, self._room, (query_start, lengths)
        )
        return decodes, groups
