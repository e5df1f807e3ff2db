"""Both cache groups under random traffic, on vLLM's KVCacheManager and a shadow memory.

Each run checks at every step that all tokens a sequence reads are its own prefix, that no
block is used after it was freed or written twice, that `held` is what sequences hold, that
raw blocks stay within `peak_blocks`, and at the end that every block came back.
"""

from __future__ import annotations

import math
import random

import pytest

from vllm_kvpca.pages.block_sizes import BlockSizes, decoding_blocks
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.serving.cache.managers import ArchiveManager, RecentManager

from .shadow import BUDGET, Engine, Mix, ShadowError, pool_for, random_traffic


def mix(*pairs: tuple[int, int], **own) -> Mix:
    return Mix(tuple(BlockSizes(*sizes) for sizes in pairs), **own)


MIXES = {
    "32+80": mix((32, 80)),
    "80+112": mix((80, 112)),
    "32+32": mix((32, 32)),
    "32+48": mix((32, 48)),
    "40+104": mix((40, 104)),
    "64+120": mix((64, 120)),
    "three pairs": mix((32, 80), (32, 80), (32, 80)),
    "two head shapes": mix((40, 104), (32, 48)),
    "pages twice as large": mix((32, 80), (64, 160)),
    "a window": mix((32, 80), windows=((32, 100),)),
    "two pairs, two windows": mix((48, 88), (48, 88), windows=((16, 40), (16, 40))),
    "chunks": mix((32, 80), chunks=((32, 96),)),
    "states": mix((32, 80), states=(32,)),
    "two pairs, inner states": mix((48, 88), (48, 88), states=(48, 48), inner=True),
}
THRESHOLDS = [(256, 128), (0, 0), (300, 0), (512, 512)]
CELLS = [
    (name, THRESHOLDS[(row + lag) % len(THRESHOLDS)], lag)
    for row, name in enumerate(MIXES)
    for lag in {row % 3, (row + 1) % 3}
]
"""Each mix with two of the numbers of steps in flight, and every number with all thresholds."""


def run(name, thresholds, lag, *, steps=170, room=1.0, **options) -> Engine:
    """Random traffic in a pool for `room` of the longest sequences."""
    mix = MIXES[name]
    longest = 2 * max(plan.archive_block for plan in mix.pairs) + max(thresholds[0], 256) + 200
    blocks = int(room * pool_for(mix, thresholds, longest + 200, lag + 1))
    engine = Engine(mix, *thresholds, lag=lag, blocks=blocks, **options)
    random_traffic(engine, random.Random(lag + 1), steps, longest)
    return engine


@pytest.mark.parametrize(("name", "thresholds", "lag"), CELLS)
def test_every_sequence_reads_its_own_prefix_under_pressure(name, thresholds, lag):
    engine = run(name, thresholds, lag, reserve=False)
    for what in ("hits", "preemptions", "finished"):
        assert engine.counts[what] > 0, engine.counts
    assert engine.worker.archived > 0


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_admission_that_reserves_the_whole_prompt(lag):
    for name in list(MIXES)[lag::3]:
        engine = run(name, (256, 128), lag, room=2)
        assert engine.counts["finished"] > 3 and engine.worker.archived > 0


@pytest.mark.parametrize(("name", "thresholds", "lag"), [c for c in CELLS if "+" in c[0]])
def test_a_decoding_sequence_holds_no_more_than_is_reported(name, thresholds, lag):
    """The capacity vLLM reports rests on decoding_blocks; only just after the boundary has
    moved do raw blocks wait for their step to be processed."""
    mix = MIXES[name]
    (plan,), step = mix.pairs, mix.pairs[0].archive_block
    engine = Engine(mix, *thresholds, lag=lag, blocks=400)
    (policy,), (recent,), (archive,) = engine.policies, engine.recents, engine.archives
    prompt, output = 2 * step + max(thresholds[0], 256), 2 * step + 50
    sequence = engine.submit(list(range(1, prompt + output + 1)), prompt)
    computed, most = [], 0
    while engine.running or engine.waiting:
        engine.step()
        computed.append(sequence.request.num_computed_tokens)
        decoding = computed[-lag - 3 :]
        settled = len({policy.boundary(n) for n in decoding}) == 1
        if settled and decoding == list(range(decoding[0], decoding[0] + lag + 3)):
            name, length = sequence.request.request_id, computed[-1]
            rows = recent.req_to_blocks.get(name, ())
            held = sum(not block.is_null for block in rows)
            held += len(archive.req_to_blocks.get(name, ()))
            assert held <= decoding_blocks(policy, plan.raw_block, length)
            most = max(most, held)
    assert most == decoding_blocks(policy, plan.raw_block, length)


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("name", MIXES)
def test_the_smallest_pool_that_vllm_accepts_serves_the_longest_sequence(name, lag):
    """What the specs ask for, over all groups, is enough; also for requests that are admitted
    with a hit that is archived beyond the boundary, because raw blocks are gone."""
    mix, longest = MIXES[name], 900
    for thresholds in [(256, 128), (700, 256)]:
        blocks = pool_for(mix, thresholds, longest, lag + 1)
        engine = Engine(mix, *thresholds, lag=lag, blocks=blocks)
        for prompt in (850, 850, 300, 600, 850):
            engine.submit(list(range(1, prompt + 21)), prompt)
        for _ in range(400):
            engine.step()
        assert engine.counts["finished"] == 5, name
        engine.shut_down()


@pytest.mark.parametrize("name", ["40+104", "three pairs", "two head shapes", "a window"])
def test_without_prefix_caching(name):
    engine = run(name, (256, 128), lag=1, reserve=False, caching=False)
    assert engine.counts["hits"] == 0
    assert engine.counts["finished"] > 3 and engine.worker.archived > 0


def ask(engine: Engine, prompts: list[list[int]]) -> list[int]:
    """Prompts one after another, each answered with one token; tokens that each found cached."""
    before = len(engine.hits)
    for prompt in prompts:
        engine.submit([*prompt, 1], len(prompt))
        while engine.running or engine.waiting:
            engine.step()
    return engine.hits[before:]


def step_of(mix: Mix) -> int:
    """Tokens that a hit may fall short of what vLLM would find with blocks of one token."""
    return math.lcm(*(plan.raw_block for plan in mix.pairs), *mix.sizes[2 * len(mix.pairs) :])


def shared_step_of(mix: Mix) -> int:
    """The same for what two prompts share: states are kept only where a prompt's steps end."""
    steps = [BUDGET // size * size for size in mix.states]
    return math.lcm(step_of(mix), *steps)


@pytest.mark.parametrize("name", MIXES)
def test_a_prompt_asked_twice_is_found_up_to_a_raw_block(name):
    mix = MIXES[name]
    for lag, thresholds in enumerate([(256, 128), (0, 0), (512, 256)]):
        engine = Engine(mix, *thresholds, lag=lag, blocks=900)
        for number, length in enumerate([50, 257, 512, 700, 1000, 1501, 2000]):
            prompt = [number + 1] * length
            first, second = ask(engine, [prompt, prompt])
            assert first == 0
            # Without raw tokens at the end of a prompt, hits end where archive blocks do.
            step = step_of(mix) if thresholds[1] else math.lcm(*mix.sizes)
            assert length - 1 - second < step, (length, second)
        engine.shut_down()


@pytest.mark.parametrize("name", MIXES)
def test_a_chat_goes_on_where_it_was(name):
    """Eight turns: each prompt is the last one with its answer and a new question."""
    mix = MIXES[name]
    engine = Engine(mix, 256, 128, lag=1, blocks=900)
    text: list[int] = []
    for turn in range(8):
        question = [turn * 1000 + token for token in range(1, 150 + 10 * turn)]
        before, text = len(text), text + question
        engine.submit(text + [7] * 40, len(text))
        while engine.running or engine.waiting:
            engine.step()
        # Sampled tokens are computed, all but the last.
        assert before - 1 - engine.hits[-1] < step_of(mix) or not before
        text = text + [7] * 40
    assert engine.counts["mixed_hits"] > 3
    engine.shut_down()


@pytest.mark.parametrize("name", MIXES)
def test_a_short_request_shares_the_prefix_of_a_long_one(name):
    """The long one's raw blocks are freed, but nobody has taken them yet: as good as stock."""
    mix = MIXES[name]
    engine = Engine(mix, 512, 256, lag=1, blocks=900)
    long = list(range(1, 2001))
    ask(engine, [long])
    for shared in (60, 200, 333, 500, 700, 1100, 1900):
        (found,) = ask(engine, [long[:shared] + [7, 7]])
        assert shared - found < shared_step_of(mix), (shared, found)
    engine.shut_down()


@pytest.mark.parametrize("name", MIXES)
def test_where_raw_blocks_were_taken_whole_archive_blocks_are_found(name):
    """Hits that end inside a raw block: the requests that follow read and continue them."""
    mix = MIXES[name]
    engine = Engine(mix, 512, 256, lag=1, blocks=900)
    long = list(range(1, 1501))
    ask(engine, [long])
    for manager in engine.recents:
        cached = engine.pool.cached_block_hash_to_block
        own = manager.kv_cache_group_id.to_bytes(4, "big")
        blocks = [b for b in engine.pool.blocks if b.block_hash and b.block_hash.endswith(own)]
        assert blocks and cached
        engine.pool.evict_blocks({block.block_id for block in blocks})
    own = math.lcm(*(size for size, _ in mix.windows + mix.chunks))
    whole = math.lcm(*(plan.archive_block for plan in mix.pairs), own)
    if mix.states:
        whole = math.lcm(whole, shared_step_of(mix))
    for shared in (350, 500, 700, 1100):
        (found,) = ask(engine, [long[:shared] + [7, 7] + [shared] * 300])
        assert found >= shared // whole * whole - (max(512, 256 + whole) if mix.windows else 0)
    for shared in (350, 500, 700, 1100):  # what those have cached is right, too
        ask(engine, [long[:shared] + [7, 7] + [shared] * 700])
    if "+" in name and len(set(mix.sizes)) > 1:
        assert engine.counts["inner_hits"] > 0
    engine.shut_down()


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_requests_of_one_step_share_a_long_prefix(lag):
    engine = Engine(MIXES["32+80"], 256, 128, lag=lag, blocks=200)
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
        run("32+80", (256, 128), lag)


def ask_around_a_hit_that_ends_inside_a_raw_block() -> list[int]:
    """The raw blocks of tokens [240, 320) are gone, so a request goes on from token 312 of the
    archive. Another one computes the first of them; then a third asks for what the first has
    computed, and could read it raw."""
    engine = Engine(MIXES["40+104"], 512, 256, lag=1, blocks=900)
    long = list(range(1, 2001))
    ask(engine, [long])
    gone = [b.block_id for b in engine.pool.blocks if b.block_hash_num_tokens in (280, 320)]
    assert len(gone) == 2
    engine.pool.evict_blocks(set(gone))
    first = long[:317] + [7] * 90
    return ask(engine, [first, long[:285] + [8], first, first])


def test_the_block_in_which_a_hit_ends_is_not_offered():
    """But less than a raw block is recomputed, so that from then on all is whole again."""
    assert ask_around_a_hit_that_ends_inside_a_raw_block() == [312, 240, 280, 400]


def test_offering_the_block_in_which_a_hit_ends_is_caught(monkeypatch):
    cache = RecentManager.cache_blocks

    def careless(self, request, *args, **kwargs):
        self._hit_ends_in.clear()
        cache(self, request, *args, **kwargs)

    monkeypatch.setattr(RecentManager, "cache_blocks", careless)
    with pytest.raises(AssertionError, match="empty slot"):
        ask_around_a_hit_that_ends_inside_a_raw_block()


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
        run("32+80", (256, 128), lag=1)


def test_workers_that_keep_states_elsewhere_are_caught():
    """A prompt's last step leaves a state at the last multiple of the step of hits."""
    mix = MIXES["two pairs, inner states"]
    engine = Engine(mix, 256, 128, lag=1, blocks=900)
    assert engine.worker.hit_step == 48
    engine.worker.hit_step = math.lcm(*mix.sizes)
    prompt = list(range(1, 621))
    with pytest.raises(ShadowError, match="goes on from another state"):
        ask(engine, [prompt, prompt])
