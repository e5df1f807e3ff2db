"""Which raw and archive block sizes share one page.

Both groups draw pages of equal bytes from one pool, so an archive block holds as many
tokens as fit into a raw block's bytes. Whole multiples of 16 tokens waste some bytes, and
the boundary and prefix-cache hits move in steps of the least common multiple of both block
sizes. The planner weighs the two: it takes the pair with which one sequence of
max_model_len tokens occupies the fewest bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vllm_kvpca.codec.policy import Policy
from vllm_kvpca.errors import LayoutError

BLOCK_STEP = 16
RAW_BLOCKS = tuple(range(32, 257, BLOCK_STEP))
MAX_ALIGN = 640
"""Tokens; larger steps would make prefix-cache hits and the boundary too coarse."""


@dataclass(frozen=True)
class PagePlan:
    """Tokens per raw block, per archive block, and the step of the boundary."""

    raw_block: int
    archive_block: int

    @property
    def align(self) -> int:
        return math.lcm(self.raw_block, self.archive_block)

    def page_bytes_per_head(self, raw_bytes: int) -> int:
        return self.raw_block * raw_bytes


def peak_raw_blocks(policy: Policy, raw_block: int, max_model_len: int, batches: int = 1) -> int:
    """Most raw blocks one sequence holds at a time.

    That is a sequence that just passed `compress_after`, plus one tail of recent tokens
    for each further step in flight (a step's raw blocks are freed one step later).
    """
    tail = -(-(policy.keep_recent + policy.align) // raw_block) + 1
    held = max(-(-policy.compress_after // raw_block) + 1, tail) + batches * tail
    return min(-(-max_model_len // raw_block), held)


def sequence_blocks(plan: PagePlan, policy: Policy, n: int) -> int:
    """Blocks of both groups that a settled sequence of `n` tokens occupies."""
    archived = policy.boundary(n)
    return -(-(n - archived) // plan.raw_block) + -(-archived // plan.archive_block)


def plan_pages(
    raw_bytes: int,
    archive_bytes: int,
    *,
    compress_after: int,
    keep_recent: int,
    max_model_len: int,
    raw_blocks: Iterable[int] = RAW_BLOCKS,
) -> PagePlan:
    """The pair of block sizes that fits most tokens of a max_model_len sequence.

    Args:
        raw_bytes, archive_bytes: bytes of one token and head, raw and archived.
        compress_after, keep_recent, max_model_len: tokens.
        raw_blocks: candidates for the raw block size.

    Raises:
        LayoutError: no candidate works.
    """
    best: tuple[float, int, PagePlan] | None = None
    for plan in _candidates(raw_bytes, archive_bytes, raw_blocks):
        policy = Policy(compress_after, keep_recent, plan.align)
        # Averaged over one step of the boundary, else the choice hangs on the remainder.
        lengths = range(max(1, max_model_len - plan.align + 1), max_model_len + 1, BLOCK_STEP)
        blocks = sum(sequence_blocks(plan, policy, n) for n in lengths) / len(lengths)
        key = (blocks * plan.raw_block * raw_bytes, plan.align, plan)
        if best is None or key[:2] < best[:2]:
            best = key
    if best is None:
        raise LayoutError(
            f"no block sizes share a page for {raw_bytes} raw and {archive_bytes} archived bytes "
            f"with raw blocks of {list(raw_blocks)} tokens: pass --block-size 64 or 128."
        )
    return best[2]


def _candidates(
    raw_bytes: int, archive_bytes: int, raw_blocks: Iterable[int]
) -> Iterator[PagePlan]:
    for raw_block in raw_blocks:
        most = raw_block * raw_bytes // archive_bytes
        for archive_block in range(BLOCK_STEP, most + 1, BLOCK_STEP):
            plan = PagePlan(raw_block, archive_block)
            if plan.align <= MAX_ALIGN:
                yield plan
