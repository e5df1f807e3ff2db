"""How long a step spends archiving: sampled in workers, fetched by the engine.

Nothing here waits: on a GPU two events frame the archive of one layer and are read once they
have passed; the engine asks its workers every few seconds and takes the answer when it is there.
And nothing here ends a step: what fails is logged once, and samples are missing.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm_kvpca.pages.step_plan import StepPlan
from vllm_kvpca.serving.log import contained

WHAT = "times of archiving"
ASK_EVERY = 2.0
"""Seconds between two questions to the workers; each costs a message, not a wait."""

_Mark = float | torch.cuda.Event


@dataclass
class ArchiveTimer:
    """Times one layer of each step that archives; all layers do the same work.

    Attributes:
        layers: compressed layers of this engine in this worker.
    """

    layers: int = 0
    _pending: deque[tuple[_Mark, _Mark]] = field(default_factory=lambda: deque(maxlen=256))

    def start(self, step: StepPlan) -> _Mark | None:
        """Begin a sample; None where the step is known to archive nothing, and while a graph is
        captured (its replays run no Python, so events in it could not be read)."""
        if step.busy.device.type != "cuda":
            return time.perf_counter() if int(step.busy[0]) else None
        with contained(WHAT):
            return None if torch.cuda.is_current_stream_capturing() else _event()
        return None

    def stop(self, started: _Mark | None) -> None:
        """End a sample; nothing to do for None."""
        if started is None:
            return
        with contained(WHAT):
            end = time.perf_counter() if isinstance(started, float) else _event()
            self._pending.append((started, end))

    def take(self) -> list[float]:
        """Seconds of the steps sampled since the last call, over all layers."""
        seconds = []
        while self._pending and _has_passed(self._pending[0][1]):
            seconds.append(_between(*self._pending.popleft()) * self.layers)
        return seconds


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _has_passed(mark: _Mark) -> bool:
    return isinstance(mark, float) or mark.query()


def _between(start: Any, end: Any) -> float:
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1000


def timer_of(context: Mapping[str, Any]) -> ArchiveTimer:
    """The timer that an engine's layers share; a new one where none has any yet.

    Args:
        context: the engine's layers by name (static_forward_context).
    """
    timers = (getattr(layer, "timer", None) for layer in context.values())
    return next((one for one in timers if isinstance(one, ArchiveTimer)), None) or ArchiveTimer()


def take_samples(worker: Any) -> list[float]:
    """Run in each worker by the engine's collective_rpc.

    An error must stay here: of several workers that answer with one, vLLM's executor reads the
    first answer only, and takes the others for answers to the next question.
    """
    with contained(WHAT):
        return timer_of(worker.vllm_config.compilation_config.static_forward_context).take()
    return []


class SampleFetcher:
    """Brings the samples of rank 0 to the engine without ever waiting for them."""

    def __init__(self, executor: Any) -> None:
        self._executor = executor
        self._answer: Any = None
        self._asked = 0.0

    def take(self) -> list[float]:
        """What has arrived since the last call; nothing, if the workers could not be asked."""
        samples: list[float] = []
        if self._answer is not None and self._answer.done():
            answer, self._answer = self._answer, None
            with contained(WHAT):
                samples = answer.result()[0]
        if self._answer is None and time.monotonic() - self._asked >= ASK_EVERY:
            self._asked = time.monotonic()
            with contained(WHAT):
                self._answer = self._executor.collective_rpc(take_samples, non_block=True)
        return samples
