"""/metrics tells the truth about the cache, while requests run and after they end.

Expected figures come from the model's shape, the block sizes and the policy, or from vLLM's own
metrics in the same scrape: never from the code that publishes ours.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import pytest
from openai.types import Completion

from vllm_kvpca.metrics import METRICS, all_series

from .server import (
    ARCHIVE_BLOCK,
    HIT_STEP,
    MAX_MODEL_LEN,
    NAME,
    POLICY,
    RAW_BLOCK,
    Scrape,
    Server,
)

pytestmark = pytest.mark.e2e

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64  # of SmolLM2-135M
RAW_TOKEN_BYTES = LAYERS * KV_HEADS * HEAD_DIM * 2 * 2  # K and V, 16 bits each
PAGE = RAW_BLOCK * RAW_TOKEN_BYTES
# Token ids that spell nothing special; the count of a prompt is then known exactly.
WORDS = range(1000, 1400)


def prompt(length: int, first: int) -> list[int]:
    """A prompt of exactly `length` tokens; different `first` share no prefix."""
    return [WORDS[(first * 37 + i * (first + 1)) % len(WORDS)] for i in range(length)]


@contextmanager
def streaming(server: Server, tokens: list[int], count: int) -> Iterator[Iterator[Completion]]:
    """The chunks of an answer of `count` tokens; leaving early drops the connection."""
    with (
        server.client() as client,
        client.completions.create(
            model=NAME,
            prompt=tokens,
            max_tokens=count,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ) as answer,
    ):
        yield iter(answer)


def generate(
    server: Server, tokens: list[int], count: int, first_token: threading.Event | None = None
) -> None:
    """Exactly `count` tokens; `first_token` is set when the first of them arrives."""
    usage = None
    with streaming(server, tokens, count) as answer:
        for chunk in answer:
            usage = chunk.usage or usage
            if first_token is not None:
                first_token.set()
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokens), count)


@contextmanager
def sampling(server: Server) -> Iterator[list[Scrape]]:
    """Scrapes taken all the while, and once more after the last request has ended.

    They are parsed only afterwards, to leave the cores to the server meanwhile.
    """
    texts: list[str] = []
    scrapes: list[Scrape] = []
    stop = threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            texts.append(server.metrics())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield scrapes
    finally:
        stop.set()
        thread.join()
    scrapes.extend(map(Scrape, texts))
    scrapes.append(server.wait_until_idle())


@dataclass(frozen=True)
class Cache:
    """Our figures of one scrape, by their states."""

    raw_bytes: float
    archived_bytes: float
    free_bytes: float
    raw_tokens: float
    archived_tokens: float
    raw_sequences: float
    archived_sequences: float

    @staticmethod
    def of(scrape: Scrape) -> Cache:
        states = {
            "kvpca_kv_cache_bytes": ("raw", "archived", "free"),
            "kvpca_kv_cache_tokens": ("raw", "archived"),
            "kvpca_sequences": ("raw", "archived"),
        }
        return Cache(*(scrape.value(n, state=s) for n, all_ in states.items() for s in all_))

    @property
    def used_bytes(self) -> float:
        return self.raw_bytes + self.archived_bytes


@pytest.fixture(scope="module")
def at_start(server: Server) -> Scrape:
    """Before the first request: the figures are there from the start."""
    return server.scrape()


@pytest.fixture(scope="module")
def one(server: Server, at_start: Scrape) -> list[Scrape]:
    """One request, 200 to 470 tokens long: raw at first, then archived in two steps."""
    with sampling(server) as scrapes:
        generate(server, prompt(200, first=0), 270)
    return scrapes


SEVERAL = ((30, 200), (230, 200), (480, 200), (800, 300))
"""Tokens of the prompt and of the answer: one that stays raw, one that grows, two long ones.
The last is the longest, so that a second request with its prompt runs beside it."""


@pytest.fixture(scope="module")
def several(server: Server, one: list[Scrape]) -> list[Scrape]:
    """The requests of SEVERAL together, and one more with the longest one's prompt."""
    computed = threading.Event()  # the longest prompt: only then can its prefix be shared
    with sampling(server) as scrapes, ThreadPoolExecutor(5) as pool:
        jobs = [
            pool.submit(generate, server, prompt(length, first), count)
            for first, (length, count) in enumerate(SEVERAL[:-1], start=1)
        ]
        length, count = SEVERAL[-1]
        jobs.append(pool.submit(generate, server, prompt(length, first=4), count, computed))
        computed.wait(timeout=120)
        jobs.append(pool.submit(generate, server, prompt(length, first=4), 100))
        for job in jobs:
            job.result()
    return scrapes


@pytest.fixture(scope="module")
def scrapes(at_start: Scrape, one: list[Scrape], several: list[Scrape]) -> list[Scrape]:
    return [at_start, *one, *several]


def agree(scrapes: list[Scrape], holds: Callable[[Scrape], bool]) -> bool:
    """Whether something holds in every reading, but for the few that are torn: vLLM answers
    /metrics in a thread, now and then between two gauges of the same engine step."""
    torn = sum(not holds(scrape) for scrape in scrapes)
    return torn <= max(1, len(scrapes) // 30) and holds(scrapes[-1])


def blocks_in_pool(scrape: Scrape) -> int:
    """Usable blocks, from vLLM's own metric; the null block holds nothing."""
    (labels,) = scrape.samples["vllm:cache_config_info"]
    return int(dict(labels)["num_gpu_blocks"]) - 1


def test_every_metric_of_the_table_is_there(scrapes: list[Scrape]):
    for scrape in (scrapes[0], scrapes[-1]):
        published = {
            (name, tuple(sorted(dict(labels))))
            for name, samples in scrape.samples.items()
            for labels in samples
            # Prometheus' client adds the time since which a counter counts.
            if name.startswith("kvpca_") and not name.endswith("_created")
        }
        assert published == {
            (series, tuple(sorted(("model_name", "engine", *metric.labels, *bucket))))
            for series, metric in all_series().items()
            for bucket in [("le",) if series.endswith("_bucket") else ()]
        }


def test_states_are_those_of_the_documentation(scrapes: list[Scrape]):
    published: dict[str, set[str]] = {}
    for name, samples in scrapes[-1].samples.items():
        for state in (dict(labels).get("state") for labels in samples):
            if state and name.startswith("kvpca_"):
                published.setdefault(name.removeprefix("kvpca_"), set()).add(state)
    assert published == {metric.key: set(metric.states) for metric in METRICS if metric.states}


def test_labels_are_those_of_vllm(scrapes: list[Scrape]):
    ours = {key: v for n, s in scrapes[-1].samples.items() if "kvpca_" in n for key, v in s.items()}
    assert {(dict(key)["model_name"], dict(key)["engine"]) for key in ours} == {(NAME, "0")}
    assert scrapes[-1].value("kvpca_preset_info", preset="k8v4", format="k8v4") == 1


def test_raw_archived_and_free_bytes_are_the_whole_pool(scrapes: list[Scrape]):
    total = blocks_in_pool(scrapes[0]) * PAGE

    def whole(scrape: Scrape) -> bool:
        cache = Cache.of(scrape)
        return cache.used_bytes + cache.free_bytes == total

    assert agree(scrapes, whole)
    used = {Cache.of(scrape).used_bytes for scrape in scrapes}
    assert len(used) > 5, "too few different readings to prove anything"


def test_bytes_agree_with_the_usage_vllm_reports(scrapes: list[Scrape]):
    def agrees(scrape: Scrape) -> bool:
        used = scrape.value("vllm:kv_cache_usage_perc") * blocks_in_pool(scrape)
        return abs(Cache.of(scrape).used_bytes / PAGE - used) < 1e-6

    assert agree(scrapes, agrees)


def stages(scrapes: list[Scrape]) -> set[int]:
    """Boundaries seen while one sequence ran; every reading must follow the policy."""

    def follows(scrape: Scrape) -> bool:
        cache = Cache.of(scrape)
        length = int(cache.raw_tokens + cache.archived_tokens)
        return cache.archived_tokens == POLICY.boundary(length)

    assert agree(scrapes, follows)
    caches = map(Cache.of, filter(follows, scrapes))
    lengths = [int(c.raw_tokens + c.archived_tokens) for c in caches]
    lengths = [length for length in lengths if length]
    assert lengths == sorted(lengths)
    return {POLICY.boundary(n) for n in lengths}


def test_tokens_of_one_sequence_follow_the_policy(
    server: Server, one: list[Scrape], several: list[Scrape]
):
    """`several` comes first, because what it counts would else include the requests sent here."""
    seen = stages(one)
    # The longest stages last 80 steps; on a busy machine none of the scrapes may hit one.
    for attempt in range(20, 25):
        if seen >= {0, 160, 240}:
            break
        with sampling(server) as again:
            generate(server, prompt(200, first=attempt), 270)
        seen |= stages(again)
    assert {0, 160, 240} <= seen <= {0, 80, 160, 240, 320}


def test_one_sequence_holds_the_blocks_its_tokens_need(one: list[Scrape]):
    settled: set[int] = set()

    def holds(scrape: Scrape) -> bool:
        cache = Cache.of(scrape)
        length = int(cache.raw_tokens + cache.archived_tokens)
        # Raw blocks are given back one step after all their tokens were archived.
        first, before = (POLICY.boundary(n) // RAW_BLOCK for n in (length, length - 2))
        needed = (-(-length // RAW_BLOCK) - first) * PAGE
        if length and first == before:
            settled.add(length)
        right = cache.archived_bytes == cache.archived_tokens // ARCHIVE_BLOCK * PAGE
        return right and needed <= cache.raw_bytes <= needed + (first - before) * PAGE

    assert agree(one, holds)
    assert len(settled) > 3


def test_savings_are_those_of_the_blocks(scrapes: list[Scrape]):
    ratios: set[float] = set()

    def holds(scrape: Scrape) -> bool:
        cache = Cache.of(scrape)
        would_be = cache.archived_bytes / PAGE * ARCHIVE_BLOCK * RAW_TOKEN_BYTES
        saved = scrape.value("kvpca_kv_cache_saved_bytes")
        expected = (cache.raw_bytes + would_be) / cache.used_bytes if cache.used_bytes else 1
        ratio = scrape.value("kvpca_kv_cache_compression_ratio")
        ratios.add(round(ratio, 1))
        return saved == would_be - cache.archived_bytes and ratio == pytest.approx(expected)

    assert agree(scrapes, holds)
    assert min(ratios) == 1 and max(ratios) > 1.5


def test_capacity_is_what_vllm_says_it_is(server: Server, scrapes: list[Scrape]):
    said = re.search(r"KV cache size: ([\d,]+) tokens", server.log.read_text())
    assert said is not None
    for scrape in scrapes:
        capacity = scrape.value("kvpca_kv_cache_capacity_tokens")
        assert capacity == int(said[1].replace(",", ""))
        # As vLLM counts: the null block too, in sequences of the longest length.
        sequences = (blocks_in_pool(scrape) + 1) / (MAX_MODEL_LEN // RAW_BLOCK)
        raw = scrape.value("kvpca_kv_cache_capacity_raw_tokens")
        assert raw == int(sequences * MAX_MODEL_LEN)
        assert capacity > 1.9 * raw


def test_archived_tokens_are_counted_once_and_never_fall(scrapes: list[Scrape], one: list[Scrape]):
    counts = [scrape.value("kvpca_archived_tokens_total") for scrape in scrapes]
    assert counts == sorted(counts)
    assert counts[0] == 0
    last = 200 + 270 - 1  # the last token of an answer is never computed
    assert one[-1].value("kvpca_archived_tokens_total") == POLICY.boundary(last)
    # Of the two that share a prompt the second, of 100 tokens more, archives only what it has
    # not found archived: its prompt up to the boundary, with the raw tokens behind it.
    cold = sum(POLICY.boundary(length + count - 1) for length, count in SEVERAL)
    shared = SEVERAL[-1][0]
    cold += POLICY.boundary(shared + 100 - 1) - POLICY.boundary(shared)
    assert counts[-1] - POLICY.boundary(last) == cold


def test_archive_work_is_counted_in_operations_bytes_and_requests(
    one: list[Scrape], several: list[Scrape]
):
    """Of the lone request: four blocks of 80 tokens; 100 archived bytes per token and head."""
    last = one[-1]
    assert last.value("kvpca_archive_operations_total") == 4
    token_bytes = LAYERS * KV_HEADS * (HEAD_DIM + HEAD_DIM // 2 + 4)
    assert last.value("kvpca_archive_written_bytes_total") == 320 * token_bytes
    assert last.value("kvpca_request_archived_tokens_count") == 1
    assert last.value("kvpca_request_archived_tokens_sum") == 320
    # All end with what the policy says, and one stays raw. A prefix hit may begin archived.
    end = several[-1]
    assert end.value("kvpca_request_archived_tokens_count") == 1 + len(SEVERAL) + 1
    assert end.value("kvpca_request_archived_tokens_bucket", le="0.0") == 1
    boundaries = [POLICY.boundary(length + count - 1) for length, count in SEVERAL]
    second = POLICY.boundary(SEVERAL[-1][0] + 100 - 1)
    shared = POLICY.boundary(SEVERAL[-1][0] + SEVERAL[-1][1] - 1)
    total = end.value("kvpca_request_archived_tokens_sum") - 320 - sum(boundaries)
    assert second <= total <= shared


def test_archive_time_is_sampled(several: list[Scrape]):
    count = several[-1].value("kvpca_archive_step_seconds_count")
    seconds = several[-1].value("kvpca_archive_step_seconds_sum")
    assert count >= 1
    assert 1e-5 < seconds / count < 1


def sequences_run(scrape: Scrape) -> bool:
    """Every sequence that vLLM runs is a raw or an archived one."""
    cache = Cache.of(scrape)
    running = scrape.value("vllm:num_requests_running")
    return cache.raw_sequences + cache.archived_sequences == running


def test_sequences_are_those_that_run(server: Server, several: list[Scrape]):
    """The answers are far too long to end before they are dropped, so on a machine of any speed
    one raw and three archived sequences run side by side for as long as the test looks."""
    assert agree(several, sequences_run)
    with ExitStack() as streams:
        for first, length in enumerate((30, 300, 310, 320), start=6):
            next(streams.enter_context(streaming(server, prompt(length, first), 3000)))
        deadline = time.monotonic() + 60
        scrape = server.scrape()
        while not (sequences_run(scrape) and scrape.value("vllm:num_requests_running") == 4):
            assert time.monotonic() < deadline, "no scrape with all four"
            scrape = server.scrape()
        cache = Cache.of(scrape)
    assert (cache.raw_sequences, cache.archived_sequences) == (1, 3)
    server.wait_until_idle()


def test_a_shared_prefix_counts_for_each_sequence_but_is_stored_once(server: Server):
    tokens, cached = prompt(800, first=5), 800 - 800 % HIT_STEP
    more = set()
    with streaming(server, tokens, 3000) as first:
        next(first)  # the prompt is computed: only then can its prefix be shared
        with streaming(server, tokens, 100) as second:
            for _ in range(20):
                next(second)
                cache = Cache.of(server.scrape())
                more.add(cache.archived_tokens / ARCHIVE_BLOCK - cache.archived_bytes / PAGE)
    server.wait_until_idle()
    assert POLICY.boundary(cached) / ARCHIVE_BLOCK in more


def test_nothing_is_held_once_all_have_ended(one: list[Scrape], several: list[Scrape]):
    for scrape in (one[-1], several[-1]):
        cache = Cache.of(scrape)
        assert cache == Cache(0, 0, blocks_in_pool(scrape) * PAGE, 0, 0, 0, 0)
        assert scrape.value("kvpca_kv_cache_saved_bytes") == 0
        assert scrape.value("kvpca_kv_cache_compression_ratio") == 1
