"""Which raw and archive block sizes share one page.

Both groups draw pages of equal bytes from one pool, so an archive block holds as many
tokens as fit into a raw block's bytes. Whole multiples of 8 tokens waste some bytes, and
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
from vllm_kvpca.pages.layout import TOGETHER

BLOCK_STEP = TOGETHER
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

    The settled part holds up to compress_after raw tokens, or less than keep_recent + align
    of them once it is archived; each step in flight adds one such tail, because its
    predecessor's blocks are freed only after it was processed. The boundary is a multiple
    of the block size, so no block is split.
    """
    tail = -(-(policy.keep_recent + policy.align) // raw_block)
    held = max(-(-policy.compress_after // raw_block), tail) + batches * tail
    return min(-(-max_model_len // raw_block), held)


def decoding_raw_blocks(
    policy: Policy, raw_block: int, max_model_len: int, batches: int = 1
) -> int:
    """Most raw blocks of a sequence that decodes its last tokens up to max_model_len.

    Less than `peak_raw_blocks`: a decoding step adds one token and leaves no tail behind, so
    each further step in flight adds one token to what the policy keeps raw.
    """
    raw = max_model_len
    if policy.boundary(max_model_len):
        raw = min(raw, policy.keep_recent + policy.align + batches - 1)
    return -(-raw // raw_block)


def sequence_blocks(plan: PagePlan, policy: Policy, max_model_len: int, batches: int = 1) -> int:
    """Blocks of both groups in use by one decoding sequence of `max_model_len` tokens."""
    archive = -(-policy.boundary(max_model_len) // plan.archive_block)
    return archive + decoding_raw_blocks(policy, plan.raw_block, max_model_len, batches)


def peak_blocks(plan: PagePlan, policy: Policy, max_model_len: int, batches: int = 1) -> int:
    """Blocks that a pool must have so that one sequence can always go on."""
    archive = -(-policy.boundary(max_model_len) // plan.archive_block)
    return archive + peak_raw_blocks(policy, plan.raw_block, max_model_len, batches)


def plan_pages(
    raw_bytes: int,
    archive_bytes: int,
    *,
    compress_after: int,
    keep_recent: int,
    max_model_len: int,
    batches: int = 1,
    raw_blocks: Iterable[int] = RAW_BLOCKS,
) -> PagePlan:
    """The pair of block sizes that fits most tokens of a max_model_len sequence.

    Args:
        raw_bytes, archive_bytes: bytes of one token and head, raw and archived.
        compress_after, keep_recent, max_model_len: tokens.
        batches: steps that vLLM keeps in flight (2 with async scheduling).
        raw_blocks: candidates for the raw block size.

    Raises:
        LayoutError: no candidate works.
    """
    best: tuple[float, int, PagePlan] | None = None
    for plan in _candidates(raw_bytes, archive_bytes, raw_blocks):
        policy = Policy(compress_after, keep_recent, plan.align)
        blocks = sequence_blocks(plan, policy, max_model_len, batches)
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
