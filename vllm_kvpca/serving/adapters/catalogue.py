"""All patches, in the order of docs/architecture.md, and all changes that they come to."""

from __future__ import annotations

from vllm_kvpca.serving.adapters import (
    cache_groups,
    chunked_local,
    cpu_platform,
    engine_config,
    figures,
    flags,
)
from vllm_kvpca.serving.adapters.changes import Change, Patch
from vllm_kvpca.serving.adapters.hooks import HOOKS

PATCHES: tuple[Patch, ...] = (
    flags.PATCH,
    engine_config.PATCH,
    cpu_platform.PATCH,
    chunked_local.PATCH,
    cache_groups.COVERAGE,
    cache_groups.PREFIX_HITS,
    *figures.PATCHES,
)
CHANGES: tuple[Change, ...] = (*HOOKS, *(c for patch in PATCHES for c in patch.changes))


def as_markdown() -> str:
    """The catalogue as docs/architecture.md shows it."""
    parts = []
    for patch in PATCHES:
        names = ", ".join(f"`{change.target.partition(':')[2]}`" for change in patch.changes)
        parts.append(
            f"- **{patch.title}** ({names}). Why: {patch.why} How: {patch.how} "
            f"Waits for {patch.waits_for}. If it fails: {patch.fails}"
        )
    return "\n".join(parts)


def not_made() -> list[str]:
    """Targets of the changes that are not in effect."""
    return [change.target for change in CHANGES if not change.is_made()]
