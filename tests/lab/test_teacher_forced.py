"""What share of the attended keys of a reading was archived."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpca.lab.teacher_forced import archived_share
from vllm_kvpca.pages.boundary import Policy


def share_by_pairs(chunks, after, recent, align):
    """Every (query, key) pair, one at a time."""
    archived = attended = computed = 0
    for count in chunks:
        n = computed
        border = 0
        while n > after and border + align <= n - recent:
            border += align
        for query in range(computed, computed + count):
            for key in range(query + 1):
                attended += 1
                archived += key < border
        computed += count
    return archived / attended


@given(
    chunks=st.lists(st.integers(1, 25), min_size=1, max_size=8),
    after=st.integers(0, 40),
    kept=st.integers(0, 40),
    align=st.integers(1, 20),
)
@settings(max_examples=200, deadline=None)
def test_archived_share_counts_pairs(chunks, after, kept, align):
    recent = min(kept, after)
    share = archived_share(chunks, Policy(after, recent, align))
    assert share == pytest.approx(share_by_pairs(chunks, after, recent, align))


def test_archived_share_of_nothing_and_of_raw():
    assert archived_share([], Policy(0, 0, 16)) == 0
    assert archived_share([100], Policy(0, 0, 16)) == 0  # a single chunk attends to itself, raw
    assert archived_share([16, 16], Policy(512, 256, 16)) == 0
    assert archived_share([16, 16], None) == 0  # stock
