"""Prefix-cache hits that span both cache groups.

A prefix of n tokens can be reused if some b exists with [0, b) cached in the archive and
[b, n) cached raw. Both managers run this search with the same inputs and so agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vllm_kvpca.pages.boundary import Policy

_ATTRIBUTE = "_kvpca_groups"


@dataclass(frozen=True)
class GroupView:
    """What the other group's manager needs to know of a group.

    `need` is the most blocks of the group that one sequence holds.
    """

    group_id: int
    block_size: int
    policy: Policy
    need: int

    @staticmethod
    def announce(block_pool: Any, role: str, view: GroupView) -> None:
        """Remember a group with its pool: vLLM's search gets the pool, not the managers."""
        block_pool.__dict__.setdefault(_ATTRIBUTE, {})[role] = view

    @staticmethod
    def known(block_pool: Any) -> list[GroupView]:
        """The groups announced so far."""
        return list(getattr(block_pool, _ATTRIBUTE).values())

    @staticmethod
    def of(block_pool: Any) -> tuple[GroupView, GroupView]:
        """(recent, archive) of a pool."""
        groups = getattr(block_pool, _ATTRIBUTE)
        return groups["recent"], groups["archive"]


@dataclass(frozen=True)
class JointHit:
    """`length` tokens, and the rows of both groups ("recent", "archive") that hold them."""

    length: int
    blocks: dict[str, list[Any]]


def joint_hit(block_hashes: Any, max_length: int, pool: Any, alignment: int) -> JointHit:
    """The longest prefix that both groups together still hold.

    Args:
        block_hashes: the request's hashes, one for each `pool.hash_block_size` tokens.
        max_length: tokens that may be reused at most.
        alignment: tokens; a hit's length is a multiple of it.

    Returns:
        The hit; raw rows that lie below its archived part as a whole are the null block, from
        which the worker reads off where the raw tokens start.
    """
    recent, archive = GroupView.of(pool)
    find_raw = _lookup(block_hashes, pool, recent)
    find_archived = _lookup(block_hashes, pool, archive)
    archived: list[Any] = []
    while (len(archived) + 1) * archive.block_size <= max_length:
        block = find_archived(len(archived))
        if block is None:
            break
        archived.append(block)
    covered = len(archived) * archive.block_size

    for length in range(max_length // alignment * alignment, 0, -alignment):
        split = _split(find_raw, recent, archive.block_size, length, covered)
        if split is not None:
            first, rows = split // recent.block_size, length // recent.block_size
            raw = [find_raw(row) if row >= first else pool.null_block for row in range(rows)]
            return JointHit(
                length, {"recent": raw, "archive": archived[: split // archive.block_size]}
            )
    return JointHit(0, {"recent": [], "archive": []})


def _lookup(block_hashes: Any, pool: Any, group: GroupView) -> Callable[[int], Any]:
    per_block = group.block_size // pool.hash_block_size
    found: dict[int, Any] = {}

    def find(row: int) -> Any:
        if row not in found:
            index = (row + 1) * per_block - 1
            cached = None
            if index < len(block_hashes):
                cached = pool.get_cached_block(block_hashes[index], [group.group_id])
            found[row] = cached[0] if cached else None
        return found[row]

    return find


def _split(
    find_raw: Callable[[int], Any], recent: GroupView, step: int, length: int, covered: int
) -> int | None:
    """Smallest b, a multiple of `step` and no lower than the boundary, such that raw blocks
    hold [b, length) and the archive holds [0, b). Whole archive blocks, so that none that is
    shared is ever written again."""
    lowest = recent.policy.boundary(length)
    row = length // recent.block_size
    while row * recent.block_size > lowest and find_raw(row - 1) is not None:
        row -= 1
    split = max(lowest, -(-(row * recent.block_size) // step) * step)
    return split if split <= covered else None
