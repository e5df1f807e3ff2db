"""Entry point of the group `vllm.general_plugins`: vLLM calls it in every process.

vLLM does not catch what a plugin raises, so an error here would end every server on the machine,
compressed or not: `register` raises nothing. Either all of our changes fit the installed vLLM and
are made, or vLLM stays as it is, one line says why, and asking for compression is refused.
"""

from __future__ import annotations

import multiprocessing
import sys
from functools import cache

from vllm_kvpca.serving.adapters.changes import Misfit, Step, make_all, undo_all
from vllm_kvpca.serving.log import logger

_made: list[Step] = []
"""Our changes of vLLM in this process."""
_guard: list[Step] = []
"""What refuses compression in this process; empty where compression works."""


def register() -> None:
    """Make the backend, the cache groups and the flags known. Safe to call again."""
    try:
        reason = _register()
        if reason is not None:
            _refuse(reason)
    except Exception:
        logger.exception("vllm-kvpca could not be loaded: KV compression is off.")


def _register() -> str | None:
    """Why nothing was changed; None if everything is in effect."""
    from vllm import __version__ as version

    from vllm_kvpca.serving.versions import ALLOW_UNTESTED, may_use, shown_range

    if not may_use(version):
        return (
            f"vllm-kvpca is tested with {shown_range()} and this is vLLM {version}: install a "
            f"tested version, or set {ALLOW_UNTESTED}=1 to try this one"
        )
    try:
        from vllm_kvpca.serving.adapters.catalogue import CHANGES

        undo_all(_guard)
        _made.extend(make_all(CHANGES))
    except Misfit as misfit:
        return (
            f"vllm-kvpca does not fit this vLLM {version} ({misfit}): install {shown_range()} "
            "without other plugins that change the same"
        )
    return None


def _refuse(reason: str) -> None:
    from vllm_kvpca.serving.adapters.guard import may_ask, refuse

    _warn(reason)
    if not _guard and may_ask(sys.argv):
        _guard.extend(
            refuse(f"KV compression: {reason}, or serve without --kv-compression-preset.")
        )


@cache
def _warn(reason: str) -> None:
    """One line per server, although its other processes load plugins as well."""
    if multiprocessing.parent_process() is None:
        logger.warning("KV compression is off and vLLM is unchanged: %s.", reason)
