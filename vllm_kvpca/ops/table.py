"""The ops of a step, in torch and in Triton, behind the same signatures."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple, Protocol

import torch

from vllm_kvpca.ops.archive import reference as archive_reference
from vllm_kvpca.ops.attend import reference as attend_reference
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.expand import reference as expand_reference
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.locate import reference as locate_reference
from vllm_kvpca.ops.positions import ranges, table_slots
from vllm_kvpca.ops.store import reference as store_reference
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.pages.step_plan import PrefillGroup, StepPlan, StepTokens


class _Locate(Protocol):
    def __call__(
        self,
        query_start: torch.Tensor,
        lengths: torch.Tensor,
        recent_table: torch.Tensor,
        plan: LayerPlan,
        starts: torch.Tensor,
        busy: torch.Tensor,
    ) -> None: ...


class _Write(Protocol):
    def __call__(self, step: StepPlan, tokens: StepTokens, cache: LayerCache) -> None: ...


class _Expand(Protocol):
    def __call__(
        self,
        step: StepPlan,
        group: PrefillGroup,
        tokens: StepTokens,
        cache: LayerCache,
        out_k: torch.Tensor,
        out_v: torch.Tensor,
    ) -> None: ...


class _Attend(Protocol):
    def __call__(
        self,
        step: StepPlan,
        tokens: StepTokens,
        cache: LayerCache,
        softmax: Softmax,
        workspace: Any,
    ) -> None: ...


class Ops(NamedTuple):
    """One implementation of all of them; the families' reference modules say what each does."""

    locate: _Locate
    store: _Write
    archive: _Write
    expand: _Expand
    attend: _Attend


REFERENCE = Ops(
    locate_reference.locate,
    store_reference.store,
    archive_reference.archive,
    expand_reference.expand,
    attend_reference.attend,
)


def ops_for(device: torch.device) -> Ops:
    """What computes on a device: Triton's kernels on a GPU, torch elsewhere."""
    return REFERENCE if device.type != "cuda" else kernels()


@cache  # every layer asks in every step
def kernels() -> Ops:
    """Triton's, which also run in its interpreter."""
    # Triton is at home where there is a GPU; elsewhere it need not be installed.
    from vllm_kvpca.ops.archive.kernel import archive
    from vllm_kvpca.ops.attend.kernel import attend
    from vllm_kvpca.ops.expand.kernel import expand
    from vllm_kvpca.ops.locate.kernel import locate
    from vllm_kvpca.ops.store.kernel import store

    return Ops(locate, store, archive, expand, attend)


def make_step(
    ops: Ops,
    layer: LayerPlan,
    query_start: torch.Tensor,
    lengths: torch.Tensor,
    recent_table: torch.Tensor,
    archive_table: torch.Tensor,
    **attending: Any,
) -> StepPlan:
    """The plan of a step outside of an engine, from lengths and block tables alone.

    Args:
        attending: `decodes`, `prefills` and `chunks`, see StepPlan.
    """
    starts = torch.empty_like(lengths)
    busy = torch.zeros(len(lengths) + 1, dtype=torch.int32, device=lengths.device)
    ops.locate(query_start, lengths, recent_table, layer, starts, busy)
    computed = lengths - query_start.diff()
    sequence, position = ranges(computed, lengths)
    slots = table_slots(recent_table, sequence, position, layer.raw_block)
    return StepPlan(
        layer, query_start, lengths, starts, busy, slots, recent_table, archive_table, **attending
    )
