"""The boundary between archived and raw tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.pages.boundary import Policy


@st.composite
def policies(draw) -> Policy:
    compress_after = draw(st.integers(0, 2000))
    keep_recent = draw(st.integers(0, compress_after))
    return Policy(compress_after, keep_recent, align=draw(st.integers(1, 640)))


lengths = st.integers(0, 5000)


@given(policies(), lengths)
def test_archived_tokens_come_in_whole_steps_and_leave_the_recent_ones(policy, n):
    boundary = policy.boundary(n)
    assert boundary % policy.align == 0
    if n <= policy.compress_after:
        assert boundary == 0
    else:
        raw = n - boundary
        assert min(policy.keep_recent, n) <= raw
        assert raw < policy.keep_recent + policy.align or boundary == 0


@given(policies(), lengths, lengths)
def test_archived_tokens_never_become_raw_again(policy, a, b):
    assert policy.boundary(min(a, b)) <= policy.boundary(max(a, b))


@given(policies(), st.lists(lengths, min_size=1, max_size=20))
def test_the_worker_s_tensor_version_agrees_with_the_scheduler_s(policy, ns):
    for dtype in (torch.int32, torch.int64):
        boundaries = policy.boundaries(torch.tensor(ns, dtype=dtype))
        assert boundaries.dtype == dtype
        assert boundaries.tolist() == [policy.boundary(n) for n in ns]


def test_a_worked_example():
    policy = Policy(512, 256, align=160)
    assert [policy.boundary(n) for n in (0, 512, 513, 576, 735, 736)] == [0, 0, 160, 320, 320, 480]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((-1, 0, 1), r"compress_after is -1.*--kv-compress-after"),
        ((0, -5, 1), r"keep_recent is -5.*--kv-keep-recent"),
        ((10, 11, 1), r"keep_recent \(11\) exceeds compress_after \(10\)"),
        ((10, 10, 0), r"align is 0"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(values, words):
    with pytest.raises(OptionsError, match=words):
        Policy(*values)
