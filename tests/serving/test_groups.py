"""Both cache groups under random traffic, on vLLM's KVCacheManager and a shadow memory.

Each run checks at every step that all tokens a sequence reads are its own prefix, that no
block is used after it was freed or written twice, that `held` is what sequences hold, that
raw blocks stay within `peak_blocks`, and at the end that every block came back.
"""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.pages.block_sizes import PagePlan, decoding_blocks, peak_blocks
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.serving.cache.managers import ArchiveManager, RecentManager

from .shadow import Engine, make_manager, make_specs, random_traffic

PLANS = [(32, 80), (80, 112), (32, 32), (32, 48), (40, 104)]
THRESHOLDS = [(256, 128), (0, 0), (300, 0), (512, 512)]


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Thousands of tiny tensor operations are several times faster without threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(plan, thresholds, lag, *, steps=170, room=1.15, **options) -> Engine:
    """Random traffic in a pool for `room` of the longest sequences."""
    plan = PagePlan(*plan)
    longest = 2 * plan.hit_step + max(thresholds[0], 256)
    policy = Policy(*thresholds, plan.align)
    blocks = 2 + int(room * peak_blocks(plan, policy, longest + 200, lag + 1))
    engine = Engine(plan, *thresholds, lag=lag, blocks=blocks, **options)
    random_traffic(engine, random.Random(lag + 1), steps, longest)
    return engine


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_sequence_reads_its_own_prefix_under_pressure(plan, thresholds, lag):
    engine = run(plan, thresholds, lag, reserve=False)
    for what in ("hits", "preemptions", "finished"):
        assert engine.counts[what] > 0, engine.counts
    assert engine.worker.archived > 0


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_admission_that_reserves_the_whole_prompt(plan, lag):
    engine = run(plan, (256, 128), lag, room=2)
    assert engine.counts["finished"] > 3 and engine.worker.archived > 0


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("thresholds", THRESHOLDS)
@pytest.mark.parametrize("plan", PLANS)
def test_a_decoding_sequence_holds_no_more_than_is_reported(plan, thresholds, lag):
    """The capacity vLLM reports rests on decoding_blocks; only just after the boundary has
    moved do raw blocks wait for their step to be processed."""
    plan = PagePlan(*plan)
    engine = Engine(plan, *thresholds, lag=lag, blocks=400)
    prompt, output = 2 * plan.hit_step + max(thresholds[0], 256), 2 * plan.hit_step + 50
    sequence = engine.submit(list(range(1, prompt + output + 1)), prompt)
    computed, most = [], 0
    while engine.running or engine.waiting:
        engine.step()
        computed.append(sequence.request.num_computed_tokens)
        decoding = computed[-lag - 3 :]
        settled = len({engine.policy.boundary(n) for n in decoding}) == 1
        if settled and decoding == list(range(decoding[0], decoding[0] + lag + 3)):
            name, length = sequence.request.request_id, computed[-1]
            rows = engine.recent.req_to_blocks.get(name, ())
            held = sum(not block.is_null for block in rows)
            held += len(engine.archive.req_to_blocks.get(name, ()))
            assert held <= decoding_blocks(engine.policy, plan.raw_block, length)
            most = max(most, held)
    assert most == decoding_blocks(engine.policy, plan.raw_block, length)


def test_a_pool_in_which_a_sequence_could_get_stuck_is_refused():
    plan = PagePlan(32, 80)
    recent, archive = (
        dataclasses.replace(spec, max_model_len=4096) for spec in make_specs(plan, 512, 256, 2)
    )
    need = peak_blocks(plan, recent.policy, 4096, 2)
    make_manager(recent, archive, need + 1)
    with pytest.raises(OptionsError, match=r"needs \d+ KV cache blocks.*lower --max-model-len"):
        make_manager(recent, archive, need)


@pytest.mark.parametrize("plan", PLANS)
def test_without_prefix_caching(plan):
    engine = run(plan, (256, 128), lag=1, reserve=False, caching=False)
    assert engine.counts["hits"] == 0
    assert engine.counts["finished"] > 3 and engine.worker.archived > 0


@pytest.mark.parametrize("lag", [0, 1, 2])
@pytest.mark.parametrize("plan", PLANS)
def test_a_hit_through_archive_and_recent_blocks(plan, lag):
    plan = PagePlan(*plan)
    engine = Engine(plan, 2 * plan.hit_step, 2 * plan.hit_step, lag=lag, blocks=400)
    prefix = list(range(1, 5 * plan.hit_step + 1))
    for question in ([1001, 1002], [1003, 1004], [1005, 1006]):
        engine.submit(prefix + question, len(prefix) + 1)
        while engine.running or engine.waiting:
            engine.step()
    assert engine.counts["mixed_hits"] == 2
    engine.shut_down()


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_requests_of_one_step_share_a_long_prefix(lag):
    plan = PagePlan(32, 80)
    engine = Engine(plan, 256, 128, lag=lag, blocks=200)
    prefix = list(range(1, 700))
    for name in range(5):
        engine.submit([*prefix, 1000 + name] + [name + 1] * 100, 700)
    while engine.running or engine.waiting:
        engine.step()
    assert engine.counts["hits"] == 4 and engine.counts["finished"] == 5
    engine.shut_down()


def shift_boundary(monkeypatch, manager, method, blocks):
    """Let one method of a manager see a boundary that is off by some aligned steps."""
    original = getattr(manager, method)

    def shifted(self, *args):
        boundary = Policy.boundary

        def off(policy, n):
            right = boundary(policy, n)
            return max(0, right + blocks * policy.align) if right else right

        with monkeypatch.context() as patch:
            patch.setattr(Policy, "boundary", off)
            result = original(self, *args)
            return iter(list(result)) if method == "_new_rows" else result

    monkeypatch.setattr(manager, method, shifted)


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_freeing_one_block_too_early_is_caught(monkeypatch, lag):
    right = RecentManager.get_num_skipped_tokens

    def early(self, computed):
        skipped = right(self, computed)
        return skipped + self.block_size if skipped else 0

    monkeypatch.setattr(RecentManager, "get_num_skipped_tokens", early)
    with pytest.raises(AssertionError, match=r"freed|null block|empty slot"):
        run((32, 80), (256, 128), lag)


@pytest.mark.parametrize(
    ("manager", "method", "steps", "message"),
    [
        (RecentManager, "_new_rows", 1, "null block"),
        (RecentManager, "_new_rows", -1, "in vain"),
        (ArchiveManager, "_missing", 1, "in vain"),
        (ArchiveManager, "_missing", -1, "null block"),
    ],
)
def test_allocating_at_a_wrong_boundary_is_caught(monkeypatch, manager, method, steps, message):
    shift_boundary(monkeypatch, manager, method, steps)
    with pytest.raises(AssertionError, match=message):
        run((32, 80), (256, 128), lag=1)
