"""What the search finds when some blocks of a prefix are cached and others are not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.serving.cache.prefix_hits import Pair, PairSearch, agreed

RECENT, ARCHIVE = 0, 1
RAW_BLOCK, ARCHIVE_BLOCK = 32, 48
HASH_BLOCK = 16
NULL = "null"


@dataclass
class Pool:
    """What a search needs of vLLM's block pool; hash number i ends after (i + 1) * 16 tokens."""

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


def make_pool(raw=(0, 0), archived=(0, 0)) -> Pool:
    pool = Pool()
    pool.put(RECENT, RAW_BLOCK, *raw)
    pool.put(ARCHIVE, ARCHIVE_BLOCK, *archived)
    return pool


def search(pool: Pool, tokens: int, max_length: int | None = None, policy=(192, 96), step=1):
    """(length, raw rows' last tokens or null, archive rows' last tokens)."""
    pair = Pair(RECENT, ARCHIVE, RAW_BLOCK, Policy(*policy, align=ARCHIVE_BLOCK))
    limit = tokens - 1 if max_length is None else max_length
    hashes = list(range(tokens // HASH_BLOCK))
    found = PairSearch(pair, hashes, pool, limit, step)
    length = found.longest(limit)
    if not length:
        return 0, [], []
    raw, archived = found.rows(length)
    assert found.longest(length) == length
    return length, [x if x == NULL else x[1] for x in raw], [x[1] for x in archived]


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


@pytest.mark.parametrize("length", [224, 256, 288, 320, 352, 448])
def test_hits_have_steps_of_a_raw_block(length):
    """None of these but 288 is a multiple of the archive block."""
    policy = Policy(192, 96, ARCHIVE_BLOCK)
    pool = make_pool(raw=(policy.boundary(length) // 32 * 32, 480), archived=(0, 432))
    found, raw, archived = search(pool, length + 1)
    assert found == length
    assert len(raw) == length // 32 and len(archived) == policy.boundary(length) // 48


def test_a_prefix_wholly_in_the_archive():
    """Its first tokens may then be archived in a sequence below compress_after."""
    assert search(make_pool(archived=(0, 96)), 150) == (96, [NULL] * 3, [48, 96])


def test_a_prefix_in_the_archive_may_end_inside_a_raw_block():
    """144 is no multiple of 32: the request gets the block of [128, 160) for itself."""
    assert search(make_pool(archived=(0, 144)), 190) == (144, [NULL] * 4, [48, 96, 144])


def test_but_not_to_spare_less_than_a_raw_block():
    """[0, 128) is there in whole raw blocks, which others can build on."""
    pool = make_pool(raw=(96, 128), archived=(0, 144))
    assert search(pool, 190) == (128, [NULL] * 3 + [128], [48, 96])


def test_other_groups_may_ask_for_a_step():
    pool = make_pool(archived=(0, 336))
    assert [search(pool, 350, step=step)[0] for step in (1, 32, 64, 128)] == [336, 288, 192, 0]


def test_the_archive_never_reaches_beyond_the_hit():
    """Blocks up to 336 are archived, but a raw block that begins where they end is gone."""
    pool = make_pool(raw=(288, 320), archived=(0, 336))
    length, raw, archived = search(pool, 330)
    assert (length, raw[-1], archived[-1]) == (320, 320, 288)


def test_a_gap_between_archive_and_raw_blocks_shortens_the_hit():
    """[0, 288) archived, [384, 480) raw: the tokens between them are gone."""
    pool = make_pool(raw=(384, 480), archived=(0, 288))
    assert search(pool, 481)[0] == 288


@pytest.mark.parametrize("evicted", [48, 192, 384])
def test_an_evicted_archive_block_ends_the_prefix(evicted):
    pool = make_pool(raw=(384, 480), archived=(0, 384))
    pool.cached.remove((ARCHIVE, evicted))
    kept = evicted - ARCHIVE_BLOCK
    assert search(pool, 481) == (
        kept,
        [NULL] * (kept // RAW_BLOCK),
        list(range(ARCHIVE_BLOCK, kept + 1, ARCHIVE_BLOCK)),
    )


@pytest.mark.parametrize(("evicted", "length"), [(416, 384), (448, 416), (480, 448)])
def test_an_evicted_raw_block_leaves_what_is_before_it(evicted, length):
    pool = make_pool(raw=(384, 480), archived=(0, 384))
    pool.cached.remove((RECENT, evicted))
    assert search(pool, 481)[0] == length


def test_the_last_token_is_never_part_of_a_hit():
    """vLLM asks for one token less than the prompt has, to compute logits from."""
    pool = make_pool(raw=(0, 192))
    assert search(pool, 192) == (160, [32, 64, 96, 128, 160], [])


def test_hashes_of_known_tokens_only():
    """Blocks past the request's own tokens are not asked for."""
    pool = make_pool(raw=(0, 480), archived=(0, 384))
    assert search(pool, tokens=100, max_length=480)[0] == 96


def test_keep_recent_zero_reads_the_archive_alone():
    pool = make_pool(raw=(0, 480), archived=(0, 480))
    length, raw, archived = search(pool, 481, policy=(0, 0))
    assert (length, set(raw), len(archived)) == (480, {NULL}, 10)


def multiples(size: int, most: int):
    return lambda limit: min(limit, most) // size * size


@pytest.mark.parametrize(
    ("holders", "expected"),
    [
        ([multiples(8, 60)], (56, 56)),
        ([multiples(8, 90), multiples(12, 80)], (72, 88)),
        ([multiples(12, 80), multiples(8, 90)], (72, 72)),
        ([multiples(7, 90), multiples(11, 90), multiples(13, 90)], (0, 84)),
    ],
)
def test_what_all_holders_agree_on(holders, expected):
    assert agreed(100, holders) == expected
