"""Which raw and archive block sizes share one page.

Both groups draw pages of equal bytes from one pool, so an archive block holds as many
tokens as fit into a raw block's bytes. The boundary moves by whole archive blocks; the raw
block it falls into stays until the boundary has passed it. Whole multiples of 8 tokens waste
some bytes, and large blocks leave more tokens raw. The planner weighs the two over sequences
of 4,000 to 65,000 tokens. Which lengths a server allows plays no part, so that a length which
fits the memory still fits when it is asked for.

Prefix-cache hits have lengths that are multiples of the raw block: of pairs that hold about as
much, the smaller blocks are better.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from vllm_kvpca.errors import LayoutError
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layout import TOGETHER

BLOCK_STEP = TOGETHER
SMALLEST_RAW_BLOCK = 32
RAW_BLOCKS = tuple(range(SMALLEST_RAW_BLOCK, 129, BLOCK_STEP))
"""What the planner chooses from; larger ones would make prefix-cache hits too coarse."""
LENGTHS = (4096, 16384, 65536)
"""Tokens of the sequences that count, all alike."""
AS_GOOD = 1.01
"""Pairs that take at most so many times the bytes of the best one are as good."""


@dataclass(frozen=True)
class BlockSizes:
    """Tokens per raw block and per archive block, which is never smaller."""

    raw_block: int
    archive_block: int

    @property
    def align(self) -> int:
        """Step of the boundary."""
        return self.archive_block

    def page_bytes_per_head(self, raw_bytes: int) -> int:
        return self.raw_block * raw_bytes


def peak_raw_blocks(policy: Policy, raw_block: int, max_model_len: int, batches: int = 1) -> int:
    """Most raw blocks one sequence holds at a time.

    The settled part holds up to compress_after raw tokens, or less than keep_recent + align
    of them once it is archived, in blocks whose first may begin before the boundary; each
    step in flight adds one such tail, because its predecessor's blocks are freed only after
    it was processed.
    """
    before = raw_block - math.gcd(raw_block, policy.align)
    tail = -(-(policy.keep_recent + policy.align + before) // raw_block)
    held = max(-(-policy.compress_after // raw_block), tail) + batches * tail
    return min(-(-max_model_len // raw_block), held)


def held_blocks(policy: Policy, raw_block: int, n: int) -> tuple[int, int]:
    """Raw and archive blocks of a decoding sequence of `n` computed tokens.

    Not counted is the moment when tokens have just been archived and their raw blocks wait
    for the step to be processed.
    """
    boundary = policy.boundary(n)
    return -(-n // raw_block) - boundary // raw_block, boundary // policy.align


def decoding_blocks(policy: Policy, raw_block: int, max_model_len: int) -> int:
    """Most blocks of both groups in use by a decoding sequence of up to `max_model_len` tokens.

    Not counted is the moment when tokens have just been archived and their raw blocks wait
    for the step to be processed: in one of `align` steps, and admission counts it
    (`peak_raw_blocks`).
    """
    # Raw blocks only grow between two moves of the boundary: look at the ends of the last few.
    moved = policy.boundary(max_model_len) + policy.keep_recent
    ends = (moved - 1 - i * policy.align for i in range(raw_block))
    lengths = [max_model_len, min(max_model_len, policy.compress_after)]
    lengths += [n for n in ends if policy.compress_after < n < max_model_len]
    return max(sum(held_blocks(policy, raw_block, n)) for n in lengths)


@lru_cache(maxsize=64)  # every layer asks
def choose_blocks(
    raw_bytes: int,
    archive_bytes: int,
    *,
    compress_after: int,
    keep_recent: int,
    raw_blocks: tuple[int, ...] = RAW_BLOCKS,
) -> BlockSizes:
    """The pair of block sizes in which sequences take the fewest bytes.

    Args:
        raw_bytes, archive_bytes: bytes of one token and head, raw and archived.
        compress_after, keep_recent: tokens.
        raw_blocks: candidates for the raw block size.

    Raises:
        LayoutError: no candidate works.
    """
    costs: dict[BlockSizes, float] = {}
    for plan in _candidates(raw_bytes, archive_bytes, raw_blocks):
        policy = Policy(compress_after, keep_recent, plan.align)
        blocks = [decoding_blocks(policy, plan.raw_block, n) / n for n in LENGTHS]
        costs[plan] = sum(blocks) * plan.raw_block
    if not costs:
        raise LayoutError(
            f"no block sizes share a page for {raw_bytes} raw and {archive_bytes} archived bytes "
            f"with raw blocks of {list(raw_blocks)} tokens: pass --block-size 64 or 128."
        )
    best = min(costs.values())
    good = [plan for plan, cost in costs.items() if cost <= AS_GOOD * best]
    return min(good, key=lambda plan: (plan.raw_block, costs[plan]))


def _candidates(
    raw_bytes: int, archive_bytes: int, raw_blocks: Iterable[int]
) -> Iterator[BlockSizes]:
    for raw_block in raw_blocks:
        most = raw_block * raw_bytes // archive_bytes
        for archive_block in range(BLOCK_STEP, most + 1, BLOCK_STEP):
            if archive_block >= raw_block:
                yield BlockSizes(raw_block, archive_block)
