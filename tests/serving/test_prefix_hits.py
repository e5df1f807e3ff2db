"""What the joint search finds when some blocks of a prefix are cached and others are not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.serving.cache.prefix_hits import GroupView, joint_hit

RECENT, ARCHIVE = 0, 1
RAW_BLOCK, ARCHIVE_BLOCK, ALIGN = 32, 48, 96
HASH_BLOCK = 16
NULL = "null"


@dataclass
class Pool:
    """What joint_hit needs of vLLM's block pool; hash number i ends after (i + 1) * 16 tokens."""

    hash_block_size: int = HASH_BLOCK
    null_block: str = NULL
    cached: set[tuple[int, int]] = field(default_factory=set)

    def get_cached_block(self, block_hash, group_ids):
        (group,) = group_ids
        key = (group, (block_hash + 1) * HASH_BLOCK)
        return [key] if key in self.cached else None

    def put(self, group: int, size: int, first: int, last: int) -> None:
        """Cache a group's blocks that hold the tokens [first, last)."""
        self.cached |= {(group, end) for end in range(first + size, last + 1, size)}


def make_pool(raw=(0, 0), archived=(0, 0), policy=(192, 96)) -> Pool:
    pool = Pool()
    policy = Policy(*policy, align=ARCHIVE_BLOCK)
    GroupView.announce(pool, "recent", GroupView(RECENT, RAW_BLOCK, policy, 0))
    GroupView.announce(pool, "archive", GroupView(ARCHIVE, ARCHIVE_BLOCK, policy, 0))
    pool.put(RECENT, RAW_BLOCK, *raw)
    pool.put(ARCHIVE, ARCHIVE_BLOCK, *archived)
    return pool


def search(pool: Pool, tokens: int, max_length: int | None = None):
    """(length, raw rows' last tokens or null, archive rows' last tokens)."""
    hashes = list(range(tokens // HASH_BLOCK))
    hit = joint_hit(hashes, tokens - 1 if max_length is None else max_length, pool, ALIGN)
    raw = [block if block == NULL else block[1] for block in hit.blocks["recent"]]
    return hit.length, raw, [block[1] for block in hit.blocks["archive"]]


def test_an_empty_cache_gives_nothing():
    assert search(make_pool(), 500) == (0, [], [])


def test_a_short_prefix_comes_from_raw_blocks_alone():
    assert search(make_pool(raw=(0, 96)), 150) == (96, [32, 64, 96], [])


def test_raw_rows_below_the_archived_part_are_null():
    """480 tokens, the boundary at 384: what the raw group still has is [384, 480)."""
    pool = make_pool(raw=(384, 480), archived=(0, 384))
    length, raw, archived = search(pool, 481)
    assert length == 480
    assert raw == [NULL] * 12 + [416, 448, 480]
    assert archived == list(range(48, 385, 48))


def test_raw_blocks_reach_below_the_boundary_but_are_not_used_there():
    """A hit never reads raw what a sequence of its length keeps archived."""
    pool = make_pool(raw=(0, 480), archived=(0, 384))
    length, raw, archived = search(pool, 481)
    assert (length, raw[:12], len(archived)) == (480, [NULL] * 12, 8)


def test_raw_blocks_are_preferred_over_archived_ones_above_the_boundary():
    """At 192 tokens nothing need be archived, so nothing is read from the archive."""
    pool = make_pool(raw=(0, 192), archived=(0, 192))
    assert search(pool, 193) == (192, [32, 64, 96, 128, 160, 192], [])


def test_the_archive_fills_in_for_evicted_raw_blocks():
    pool = make_pool(raw=(96, 192), archived=(0, 192))
    assert search(pool, 193) == (192, [NULL] * 3 + [128, 160, 192], [48, 96])


def test_the_split_is_whole_archive_blocks_so_that_shared_ones_are_never_written():
    """Raw from token 32 on: the split is at 48, inside the second raw block, not at 32."""
    pool = make_pool(raw=(32, 192), archived=(0, 192))
    assert search(pool, 193) == (192, [NULL, 64, 96, 128, 160, 192], [48])


def test_a_prefix_wholly_in_the_archive():
    """Its first tokens may then be archived in a sequence below compress_after."""
    assert search(make_pool(archived=(0, 96)), 150) == (96, [NULL] * 3, [48, 96])


def test_a_gap_between_archive_and_raw_blocks_shortens_the_hit():
    """[0, 288) archived, [384, 480) raw: the tokens between them are gone."""
    pool = make_pool(raw=(384, 480), archived=(0, 288))
    assert search(pool, 481)[0] == 288


@pytest.mark.parametrize("evicted", [48, 192, 384])
def test_an_evicted_archive_block_ends_the_prefix(evicted):
    pool = make_pool(raw=(384, 480), archived=(0, 384))
    pool.cached.remove((ARCHIVE, evicted))
    kept = (evicted - ARCHIVE_BLOCK) // ALIGN * ALIGN
    assert search(pool, 481) == (
        kept,
        [NULL] * (kept // RAW_BLOCK),
        list(range(ARCHIVE_BLOCK, kept + 1, ARCHIVE_BLOCK)),
    )


@pytest.mark.parametrize(("evicted", "length"), [(416, 384), (448, 384), (480, 384)])
def test_an_evicted_raw_block_leaves_the_archived_part(evicted, length):
    pool = make_pool(raw=(384, 480), archived=(0, 384))
    pool.cached.remove((RECENT, evicted))
    assert search(pool, 481)[0] == length


def test_the_last_token_is_never_part_of_a_hit():
    """vLLM asks for one token less than the prompt has, to compute logits from."""
    pool = make_pool(raw=(0, 192))
    assert search(pool, 192) == (96, [32, 64, 96], [])


def test_hits_end_on_the_alignment_even_if_more_blocks_are_cached():
    assert search(make_pool(raw=(0, 160)), 161)[0] == 96


def test_hashes_of_known_tokens_only():
    """Blocks past the request's own tokens are not asked for."""
    pool = make_pool(raw=(0, 480), archived=(0, 384))
    assert search(pool, tokens=100, max_length=480)[0] == 96


def test_keep_recent_zero_reads_the_archive_alone():
    pool = make_pool(raw=(0, 480), archived=(0, 480), policy=(0, 0))
    length, raw, archived = search(pool, 481)
    assert (length, set(raw), len(archived)) == (480, {NULL}, 10)
