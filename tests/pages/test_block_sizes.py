"""Block sizes that share a page."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpca.errors import LayoutError
from vllm_kvpca.pages import BlockSizes, choose_blocks, raw_token_bytes
from vllm_kvpca.pages.block_sizes import decoding_blocks, peak_raw_blocks
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.preset import FORMATS, Preset

DEFAULTS = {"compress_after": 512, "keep_recent": 256}


def plan_of(name: str, head_dim: int, **changes) -> BlockSizes:
    content = Preset(name, FORMATS[name]).layout(head_dim).content_bytes
    return choose_blocks(raw_token_bytes(head_dim), content, **(DEFAULTS | changes))


@settings(deadline=None, max_examples=50)
@given(
    head_dim=st.integers(2, 32).map(lambda n: 8 * n),
    percent=st.integers(20, 100),
    after=st.integers(0, 2000),
)
def test_an_archive_block_fits_the_page_and_steps_are_whole_blocks(head_dim, percent, after):
    raw = raw_token_bytes(head_dim)
    archived = raw * percent // 100
    plan = choose_blocks(raw, archived, compress_after=after, keep_recent=after // 2)
    assert plan.archive_block * archived <= plan.page_bytes_per_head(raw)
    assert plan.raw_block % 8 == 0 and plan.archive_block % 8 == 0
    assert plan.raw_block <= plan.archive_block == plan.align
    assert 32 <= plan.raw_block <= 128


@pytest.mark.parametrize(("head_dim", "k8v4"), [(64, (32, 80)), (128, (40, 104))])
def test_known_choices(head_dim, k8v4):
    assert plan_of("raw", head_dim) == BlockSizes(32, 32)
    assert plan_of("k8v4", head_dim) == BlockSizes(*k8v4)
    assert plan_of("k8v8", head_dim) == BlockSizes(64, 120)


@pytest.mark.parametrize("name", ["k8v8", "k8v4", "v-hadamard-mixed"])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 256])
def test_long_sequences_take_fewer_bytes_than_raw_ones(name, head_dim):
    plan = plan_of(name, head_dim)
    policy = Policy(512, 256, plan.align)
    raw_blocks = -(-32768 // plan.raw_block)
    assert decoding_blocks(policy, plan.raw_block, 32768) < raw_blocks


def test_only_the_given_raw_blocks_are_considered():
    assert plan_of("k8v4", 128, raw_blocks=(64,)).raw_block == 64


def test_no_common_page_is_refused_with_a_way_out():
    with pytest.raises(LayoutError, match=r"no block sizes share a page.*--block-size 64 or 128"):
        plan_of("k8v4", 128, raw_blocks=())


@settings(deadline=None)
@given(st.data())
def test_decoding_blocks_are_the_most_over_all_lengths(data):
    """Counted length by length, the definition."""
    after, kept = sorted(data.draw(st.lists(st.integers(0, 300), min_size=2, max_size=2)))[::-1]
    raw_block = data.draw(st.sampled_from([8, 24, 32, 40]))
    policy = Policy(after, kept, align=raw_block + data.draw(st.sampled_from([0, 8, 40, 64])))
    longest = data.draw(st.integers(1, 1500))

    def held(n):
        boundary = policy.boundary(n)
        return boundary // policy.align + len({t // raw_block for t in range(boundary, n)})

    assert decoding_blocks(policy, raw_block, longest) == max(map(held, range(1, longest + 1)))


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 20000), st.integers(1, 3))
def test_a_sequence_never_reserves_more_raw_blocks_than_it_has_tokens(a, b, length, batches):
    policy = Policy(max(a, b), min(a, b), align=160)
    peak = peak_raw_blocks(policy, 32, length, batches)
    assert peak <= -(-length // 32)
    longer = peak_raw_blocks(policy, 32, 10 * length, batches)
    assert peak <= longer <= peak_raw_blocks(policy, 32, 10 * length, batches + 1)
