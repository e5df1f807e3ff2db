"""The plugin's logger. vLLM configures the logger "vllm" only, so ours lives below it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("vllm.kvpca")

_told: set[str] = set()


@contextmanager
def contained(what: str) -> Iterator[None]:
    """For what an engine can do without: an error within is logged and goes no further.

    Args:
        what: what failed, for the log; the same one is logged once per process.
    """
    try:
        yield
    except Exception:
        if what not in _told:
            _told.add(what)
            logger.exception("KV compression: %s failed; serving goes on without.", what)
