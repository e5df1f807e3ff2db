"""Prefix-cache hits of compressed layers: which prefixes archive and recent blocks still hold.

A prefix of n tokens can be reused if some b <= n exists with [0, b) cached in the archive and
[b, n) cached raw:

* b is a multiple of the archive block, so that no shared archive block is ever written again;
* either n is a multiple of the raw block, or b = n. In the latter case the hit may end inside
  a raw block, which the request then gets for itself: its first slots stay empty, because
  their tokens are archived, so that block itself is never offered to others (RecentManager).

Layers of one shape may be spread over several pairs of groups, and there may be pairs with
other block sizes and groups of other kinds beside them: `agreed` finds the prefix that all
of them hold.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvpca.pages.boundary import Policy


@dataclass(frozen=True)
class Pair:
    """The two cache groups that serve the same layers.

    Attributes:
        recent, archive: ids of the groups.
        raw_block: tokens per recent block; an archive block holds `policy.align`.
    """

    recent: int
    archive: int
    raw_block: int
    policy: Policy


class PairSearch:
    """What one pair still holds of one request's tokens.

    Args:
        block_hashes: the request's hashes, one for each `pool.hash_block_size` tokens.
        limit: tokens that may be reused at most.
        step: of a hit's length, where other groups ask for one; tokens.
    """

    def __init__(
        self, pair: Pair, block_hashes: Sequence[Any], pool: Any, limit: int, step: int = 1
    ) -> None:
        self.pair = pair
        self._step = step
        self._null = pool.null_block
        self._raw = _lookup(block_hashes, pool, pair.recent, pair.raw_block)
        find = _lookup(block_hashes, pool, pair.archive, pair.policy.align)
        self._archived: list[Any] = []
        while (len(self._archived) + 1) * pair.policy.align <= limit:
            block = find(len(self._archived))
            if block is None:
                break
            self._archived.append(block)
        self.covered = len(self._archived) * pair.policy.align
        """Tokens that the archive holds."""

    def longest(self, limit: int) -> int:
        """Tokens of the longest prefix of at most `limit` that can be reused."""
        policy, raw_block = self.pair.policy, self.pair.raw_block
        # The boundary of any longer prefix lies above what the archive holds.
        possible = max(policy.compress_after, self.covered + policy.keep_recent + policy.align - 1)
        length = min(limit, possible)
        while length > 0:
            length = max(
                length // raw_block * raw_block,
                min(length, self.covered) // policy.align * policy.align,
            )
            # Less than a raw block is not worth one that nobody else can use.
            for candidate in (length // raw_block * raw_block, length):
                if candidate % self._step == 0 and self.split(candidate) is not None:
                    return candidate
            length -= 1
        return 0

    def split(self, length: int) -> int | None:
        """The b of a prefix of `length` tokens: as few archived tokens as possible, but no raw
        ones below the boundary. None if the prefix cannot be reused."""
        raw_block, align = self.pair.raw_block, self.pair.policy.align
        if not length:
            return None
        if length % raw_block:
            return length if length % align == 0 and length <= self.covered else None
        lowest = self.pair.policy.boundary(length)
        row = length // raw_block
        while row * raw_block > lowest and self._raw(row - 1) is not None:
            row -= 1
        split = max(lowest, -(-(row * raw_block) // align) * align)
        return split if split <= min(self.covered, length) else None

    def rows(self, length: int) -> tuple[list[Any], list[Any]]:
        """(recent, archive) blocks of a prefix that can be reused. Raw rows whose tokens are all
        archived are the null block: from them the worker reads off where the raw tokens start."""
        split = self.split(length)
        assert split is not None
        first, last = split // self.pair.raw_block, length // self.pair.raw_block
        raw = [self._null] * min(first, last) + [self._raw(row) for row in range(first, last)]
        return raw, self._archived[: split // self.pair.policy.align]


def agreed(limit: int, holders: Sequence[Callable[[int], int]]) -> tuple[int, int]:
    """The longest prefix that all holders can give.

    Args:
        limit: tokens it may have at most.
        holders: each maps a limit to the longest prefix up to it that the holder can give. Each
            is asked last with the agreed length.

    Returns:
        The prefix, and the longest that any of them could have given when first asked.
    """
    length, longest = limit, 0
    while length > 0:
        before = length
        for longest_up_to in holders:
            length = longest_up_to(length)
            if before == limit:
                longest = max(longest, length)
        if length == before:
            break
    return length, longest


def _lookup(
    block_hashes: Sequence[Any], pool: Any, group: int, block_size: int
) -> Callable[[int], Any]:
    """Finds the cached block of a row, None if there is none; asks the pool once per row."""
    per_block = block_size // pool.hash_block_size
    found: dict[int, Any] = {}

    def find(row: int) -> Any:
        if row not in found:
            index = (row + 1) * per_block - 1
            cached = None
            if index < len(block_hashes):
                cached = pool.get_cached_block(block_hashes[index], [group])
            found[row] = cached[0] if cached else None
        return found[row]

    return find
