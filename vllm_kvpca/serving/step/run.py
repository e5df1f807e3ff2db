"""Run one step of one layer: store raw, archive, attend.

The order matters: a prefix hit of the same step may read what this step archives, and what is
archived may have been computed in this step.
"""

from __future__ import annotations

from typing import Any

from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.table import Ops
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens
from vllm_kvpca.serving.observe.times import ArchiveTimer


def run_step(
    step: StepPlan,
    tokens: StepTokens,
    cache: LayerCache,
    softmax: Softmax,
    ops: Ops,
    workspace: Any = None,
    timer: ArchiveTimer | None = None,
) -> None:
    """Write the attention of all new tokens into `tokens.output`.

    Args:
        workspace: what `ops.attend` wants.
    """
    ops.store(step, tokens, cache)
    started = timer.start(step) if timer else None
    ops.archive(step, tokens, cache)
    if timer:
        timer.stop(started)
    ops.attend(step, tokens, cache, softmax, workspace)
