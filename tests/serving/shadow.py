"""A shadow of the paged memory under vLLM's own KVCacheManager.

`Engine` schedules sequences as vLLM does: chunked prefill, prefix hits, preemption, and
steps that run on the worker only after later ones were scheduled. `Worker` plans each step
with `plan_step` and moves, instead of K and V, the identity of each token: a number that
stands for the token and all tokens before it. `ShadowMemory` refuses to read what is not
there any more and to write over what is still there.
"""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from dataclasses import dataclass, field

import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from vllm_kvpca.codec.bands import Band
from vllm_kvpca.pages.block_sizes import PagePlan
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layer_plan import LayerPlan, Stream
from vllm_kvpca.serving.cache.managers import register_specs
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.step.batch import Bucket, Step, StepInput, plan_step

HEAD_SIZE = 8
MAX_MODEL_LEN = 4096
BUDGET = 256
MAX_RUNNING = 8


class ShadowError(AssertionError):
    """The memory does not hold what a step reads, or holds what a step writes over."""


def make_specs(
    plan: PagePlan, compress_after: int, keep_recent: int, batches: int = 1
) -> tuple[RecentSpec, ArchiveSpec]:
    """Specs of both groups for a page plan; their pages have equal bytes."""
    # Few bytes, so that any archive block fits: no page is ever filled here.
    streams = (
        Stream("k", HEAD_SIZE, (Band(HEAD_SIZE, 4),), "identity"),
        Stream("v", HEAD_SIZE, (Band(HEAD_SIZE, 0),), "identity"),
    )
    layer = LayerPlan(
        streams, torch.bfloat16, plan.raw_block, plan.archive_block, compress_after, keep_recent
    )
    common = {
        "num_kv_heads": 1,
        "head_size": HEAD_SIZE,
        "dtype": torch.bfloat16,
        "planned": layer,
        "max_model_len": 0,
    }
    recent = RecentSpec(block_size=plan.raw_block, batches=batches, **common)
    return recent, ArchiveSpec(block_size=plan.archive_block, **common)


def make_manager(
    recent: RecentSpec, archive: ArchiveSpec, blocks: int, caching: bool = True
) -> KVCacheManager:
    """vLLM's manager over a pool of `blocks` pages, the null block included."""
    register_specs()
    init_none_hash(sha256)
    groups = [KVCacheGroupSpec(["layer"], recent), KVCacheGroupSpec(["layer.archive"], archive)]
    sizes = recent.block_size, archive.block_size
    return KVCacheManager(
        KVCacheConfig(blocks, [], groups),
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=math.lcm(*sizes),
        hash_block_size=math.gcd(*sizes),
        max_in_flight_tokens=BUDGET,
        enable_caching=caching,
    )


def make_request(name: str, tokens: list[int], hash_block: int) -> Request:
    """A request whose prefixes vLLM hashes every `hash_block` tokens."""
    hasher = get_request_block_hasher(hash_block, sha256)
    return Request(name, tokens, SamplingParams(max_tokens=10_000), None, block_hasher=hasher)


class ShadowMemory:
    """Which token each slot of each page holds; 0 is nothing."""

    def __init__(self, blocks: int, plan: PagePlan) -> None:
        self.content = {
            "recent": torch.zeros(blocks, plan.raw_block, dtype=torch.long),
            "archive": torch.zeros(blocks, plan.archive_block, dtype=torch.long),
        }
        self.in_use = torch.zeros(blocks, dtype=torch.bool)

    def hand_over(self, new_blocks: list[int], in_use: torch.Tensor) -> None:
        """Begin a step: blocks that changed hands lose their content."""
        for content in self.content.values():
            content[new_blocks] = 0
        self.in_use = in_use

    def _locate(self, role: str, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.content[role].shape[1]
        block = torch.div(slots, size, rounding_mode="floor")
        if (block <= 0).any():
            raise ShadowError(f"{role}: the null block is used")
        if not self.in_use[block].all():
            raise ShadowError(f"{role}: a block is used after it was freed")
        return block, slots % size

    def write(self, role: str, slots: torch.Tensor, identity: torch.Tensor) -> None:
        """Fill empty slots; nothing is ever written twice."""
        block, offset = self._locate(role, slots)
        other = self.content["archive" if role == "recent" else "recent"]
        if other[block].any():
            raise ShadowError(f"{role}: a page of the other group is overwritten")
        if self.content[role][block, offset].any():
            raise ShadowError(f"{role}: a token is overwritten")
        self.content[role][block, offset] = identity

    def read(self, role: str, slots: torch.Tensor) -> torch.Tensor:
        """Identities in the given slots, all of which must hold a token."""
        block, offset = self._locate(role, slots)
        identity = self.content[role][block, offset]
        if not identity.all():
            raise ShadowError(f"{role}: an empty slot is read")
        return identity


class Sequence:
    """One request: its true tokens, what vLLM knows of them, and the worker's block tables."""

    def __init__(self, request: Request, tokens: list[int], identity: list[int], target: int):
        self.request = request
        self.tokens = tokens
        self.identity = torch.tensor(identity)
        self.target = target
        self.tables: tuple[list[int], list[int]] = ([], [])
        self.placeholders = 0
        self.admissions = 0
        self.done = False

    @property
    def pending(self) -> int:
        """Tokens that could be computed next, sampled ones still in flight included."""
        request = self.request
        return request.num_tokens + self.placeholders - request.num_computed_tokens


@dataclass(frozen=True)
class Part:
    """One sequence's share of a step, as the worker gets it."""

    sequence: Sequence
    admission: int
    computed: int
    new: int
    recent: list[int]
    archive: list[int]
    samples: bool

    @property
    def length(self) -> int:
        return self.computed + self.new


@dataclass
class ScheduledStep:
    """What the scheduler sends to the worker, and the pool's state at that time."""

    parts: list[Part] = field(default_factory=list)
    new_blocks: list[int] = field(default_factory=list)
    in_use: torch.Tensor | None = None


class Worker:
    """Runs steps in order against the shadow memory."""

    def __init__(self, memory: ShadowMemory, plan: PagePlan, policy: Policy) -> None:
        self.memory = memory
        self.plan = plan
        self.policy = policy
        self.archived = 0

    def run(self, step: ScheduledStep) -> None:
        """Store, archive and attend as serving.step does, on identities."""
        self.memory.hand_over(step.new_blocks, step.in_use)
        if not step.parts:
            return
        work = plan_step(self._step_input(step.parts))
        new = torch.cat([p.sequence.identity[p.computed : p.length] for p in step.parts])
        stored = work.store_slots >= 0
        self.memory.write("recent", work.store_slots[stored], new[stored])
        self._archive(work, new)
        self._attend(work.buckets, step.parts)

    def _step_input(self, parts: list[Part]) -> StepInput:
        return StepInput(
            query_start=torch.tensor([0] + [p.new for p in parts]).cumsum(0),
            lengths=torch.tensor([p.length for p in parts]),
            recent_table=_table([p.recent for p in parts]),
            archive_table=_table([p.archive for p in parts]),
            recent_block=self.plan.raw_block,
            archive_block=self.plan.archive_block,
            policy=self.policy,
        )

    def _archive(self, work: Step, new: torch.Tensor) -> None:
        if work.archive is None:
            return
        old = self.memory.read("recent", work.archive.recent_slots)
        self.memory.write(
            "archive", work.archive.slots, torch.cat([old, new[work.archive.new_tokens]])
        )
        self.archived += len(work.archive.slots)

    def _attend(self, buckets: list[Bucket], parts: list[Part]) -> None:
        """Every sequence must see its own prefix, from the archive and the recent part."""
        first = torch.tensor([0] + [p.new for p in parts]).cumsum(0)
        seen = []
        for bucket in buckets:
            seen.append(bucket.tokens[bucket.valid])
            for row, token in enumerate(bucket.tokens[:, 0]):
                part = parts[int((first == token).nonzero()[-1])]
                archived, skipped, recent = (
                    int(x[row])
                    for x in (bucket.archive_lengths, bucket.recent_skips, bucket.recent_lengths)
                )
                prefix = torch.cat(
                    [
                        self._read("archive", bucket.archive_table, row, 0, archived),
                        self._read("recent", bucket.recent_table, row, skipped, recent),
                    ]
                )
                if not torch.equal(prefix, part.sequence.identity[: part.computed]):
                    raise ShadowError(f"{part.sequence.request.request_id} sees other tokens")
        if not torch.equal(torch.cat(seen).sort().values, torch.arange(int(first[-1]))):
            raise ShadowError("new tokens attend twice or not at all")

    def _read(
        self, role: str, table: torch.Tensor | None, row: int, skipped: int, length: int
    ) -> torch.Tensor:
        position = torch.arange(skipped, skipped + length)
        if table is None:
            if len(position):
                raise ShadowError(f"{role}: tokens without a block table")
            return position
        size = self.memory.content[role].shape[1]
        return self.memory.read(role, table[row, position // size] * size + position % size)


def _table(rows: list[list[int]]) -> torch.Tensor:
    width = max(1, *(len(row) for row in rows)) + 16  # wider than needed, as vLLM's are
    return torch.tensor([row + [0] * (width - len(row)) for row in rows])


class Engine:
    """A small scheduler over vLLM's KVCacheManager, with `lag` steps in flight.

    With `reserve` a request is admitted only if all of its prompt fits (vLLM's default).
    `counts` says what a run exercised: hits, mixed_hits (through both groups), preemptions,
    finished.
    """

    def __init__(
        self,
        plan: PagePlan,
        compress_after: int,
        keep_recent: int,
        *,
        lag: int,
        blocks: int,
        caching: bool = True,
        reserve: bool = True,
    ) -> None:
        self.plan = plan
        self.reserve = reserve
        self.recent_spec, archive_spec = make_specs(plan, compress_after, keep_recent, lag + 1)
        self.policy = self.recent_spec.policy
        self.manager = make_manager(self.recent_spec, archive_spec, blocks, caching)
        self.recent, self.archive = self.manager.coordinator.single_type_managers
        self.pool = self.manager.block_pool
        self.worker = Worker(ShadowMemory(blocks, plan), plan, self.policy)
        self.lag = lag
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.in_flight: deque[ScheduledStep] = deque()
        self.counts: Counter[str] = Counter()
        self._identities: dict[tuple[int, int], int] = {}
        self._names = 0
        self._new_blocks: list[int] = []
        hand_out = self.pool.get_new_blocks

        def record(count: int) -> list:
            given = hand_out(count)
            self._new_blocks.extend(block.block_id for block in given)
            return given

        self.pool.get_new_blocks = record

    def submit(self, tokens: list[int], prompt: int) -> Sequence:
        """Queue a request; it ends when all of `tokens` are known."""
        target = len(tokens)
        tokens = tokens + [0] * (self.lag + 1)  # computed in vain while the end is in flight
        identity, last = [], 0
        for token in tokens:
            last = self._identities.setdefault((last, token), len(self._identities) + 1)
            identity.append(last)
        self._names += 1
        hash_block = math.gcd(self.plan.raw_block, self.plan.archive_block)
        request = make_request(str(self._names), tokens[:prompt], hash_block)
        sequence = Sequence(request, tokens, identity, target)
        self.waiting.append(sequence)
        return sequence

    def step(self) -> None:
        """Schedule a step, run those that are due, check the managers' books."""
        step, budget, preempted = ScheduledStep(), BUDGET, False
        for sequence in list(self.running):
            if sequence in self.running and budget and sequence.pending:
                new = min(budget, sequence.pending)
                fits, victims = self._allocate(sequence, new)
                preempted = preempted or victims
                if fits:
                    step.parts.append(self._dispatch(sequence, new))
                    budget -= new
        while not preempted and budget and self._admit(step, budget):
            budget -= step.parts[-1].new
        step.new_blocks, self._new_blocks = self._new_blocks, []
        step.in_use = torch.tensor([block.ref_cnt > 0 for block in self.pool.blocks])
        self.check_books()
        self.in_flight.append(step)
        while len(self.in_flight) > self.lag:
            self._settle(self.in_flight.popleft())

    def _allocate(self, sequence: Sequence, new: int) -> tuple[bool, bool]:
        """Slots for a running sequence; whether it got them, and whether any was preempted."""
        victims = False
        while (blocks := self.manager.allocate_slots(sequence.request, new)) is None:
            victim = self.running.pop()
            self._preempt(victim)
            victims = True
            if victim is sequence:
                return False, True
        for table, ids in zip(sequence.tables, blocks.get_block_ids(), strict=True):
            table.extend(ids)
        self._check_no_waste(sequence, new, [len(group) for group in blocks.blocks], 0)
        return True, victims

    def _preempt(self, sequence: Sequence) -> None:
        self.manager.free(sequence.request)
        sequence.request.num_computed_tokens = 0
        sequence.request.status = RequestStatus.PREEMPTED
        sequence.placeholders = 0
        self.waiting.appendleft(sequence)
        self.counts["preemptions"] += 1

    def _admit(self, step: ScheduledStep, budget: int) -> bool:
        if not self.waiting or len(self.running) >= MAX_RUNNING:
            return False
        sequence = self.waiting[0]
        request = sequence.request
        if request.num_in_flight_tokens:  # resumed once its last output has arrived
            return False
        hits, length, _ = self.manager.get_computed_blocks(request)
        new = min(budget, request.num_tokens - length)
        blocks = self.manager.allocate_slots(
            request, new, length, hits, full_sequence_must_fit=self.reserve
        )
        if blocks is None:
            return False
        self.running.append(self.waiting.popleft())
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = length
        sequence.admissions += 1
        sequence.tables = tuple(list(ids) for ids in self.manager.get_block_ids(request.request_id))
        hit_rows = [len(group) for group in hits.blocks]
        added = [len(t) - rows for t, rows in zip(sequence.tables, hit_rows, strict=True)]
        self._check_no_waste(sequence, new, added, hit_rows[1])
        self.counts["hits"] += length > 0
        raw_hits = sum(not block.is_null for block in hits.blocks[0])
        self.counts["mixed_hits"] += raw_hits > 0 and hit_rows[1] > 0
        step.parts.append(self._dispatch(sequence, new))
        return True

    def _dispatch(self, sequence: Sequence, new: int) -> Part:
        request = sequence.request
        samples = new == sequence.pending
        recent, archive = sequence.tables
        part = Part(
            sequence,
            sequence.admissions,
            request.num_computed_tokens,
            new,
            list(recent),
            list(archive),
            samples,
        )
        request.num_computed_tokens += new
        request.num_in_flight_tokens += new
        sequence.placeholders += samples
        return part

    def _settle(self, step: ScheduledStep) -> None:
        """Run a step on the worker and take in its output."""
        self.worker.run(step)
        for part in step.parts:
            sequence, request = part.sequence, part.sequence.request
            request.num_in_flight_tokens -= part.new
            if sequence.done or not part.samples:
                continue
            request.append_output_token_ids(sequence.tokens[request.num_tokens])
            current = part.admission == sequence.admissions and sequence in self.running
            if current:
                sequence.placeholders -= 1
                if self.manager.enable_caching:
                    known = request.num_computed_tokens - sequence.placeholders
                    self.manager.cache_blocks(request, known)
            if request.num_tokens >= sequence.target:
                self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        sequence.done = True
        self.manager.free(sequence.request)
        (self.running if sequence in self.running else self.waiting).remove(sequence)
        self.counts["finished"] += 1

    def shut_down(self) -> None:
        """Run what is in flight and abort the rest; every block must come back."""
        while self.in_flight:
            self._settle(self.in_flight.popleft())
        for sequence in [*self.running, *self.waiting]:
            self.manager.free(sequence.request)
        assert self.pool.get_num_free_blocks() == len(self.pool.blocks) - 1, "blocks leak"
        for manager in (self.recent, self.archive):
            assert not manager.held and not manager.uses, "held blocks that nobody has"
            assert not manager.req_to_blocks and not manager.num_cached_block
        assert not self.recent._freed_below and not self.archive.sequences

    def check_books(self) -> None:
        """`held` counts what sequences hold, the pool agrees, and no sequence holds too much."""
        uses: Counter[int] = Counter()
        for manager in (self.recent, self.archive):
            held: Counter[int] = Counter()
            for rows in manager.req_to_blocks.values():
                held.update(block.block_id for block in rows if not block.is_null)
            assert manager.held == held, "held differs from the blocks in use"
            assert manager.uses == held.total(), "uses differs from the blocks in use"
            uses += held
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == uses[block.block_id], "the pool counts other users"
        for sequence in self.running:
            request = sequence.request
            rows = self.recent.req_to_blocks.get(request.request_id, ())
            raw = sum(not block.is_null for block in rows)
            peak = self.recent_spec.peak_blocks(request.num_computed_tokens)
            assert raw <= peak, f"{raw} raw blocks, peak_blocks allows {peak}"

    def _check_no_waste(
        self, sequence: Sequence, new: int, added: list[int], hit_rows: int
    ) -> None:
        """New raw blocks lie above the boundary, new archive blocks below it."""
        recent, archive = sequence.tables
        boundary = self.policy.boundary(sequence.request.num_computed_tokens + new)
        first = len(recent) - added[0]
        for row, block in enumerate(recent[first:], first):
            assert not block or row >= boundary // self.plan.raw_block, "raw block in vain"
        rows = -(-boundary // self.plan.archive_block)
        held = max(rows, hit_rows, len(archive) - added[1])
        assert len(archive) <= held, "archive block in vain"


def random_traffic(engine: Engine, rng: random.Random, steps: int, longest: int) -> None:
    """Requests that share long prefixes with each other or continue finished ones."""
    shared = [[rng.randrange(1, 1000) for _ in range(longest)] for _ in range(2)]
    submitted: list[Sequence] = []
    for _ in range(steps):
        if len(engine.waiting) < 3 and rng.random() < 0.4:
            prefix = rng.choice(shared)
            if submitted and rng.random() < 0.4:
                earlier = rng.choice(submitted)
                prefix = earlier.tokens[: earlier.target]
            prefix = prefix[: rng.choice([0, longest // 4, longest // 2, longest])]
            prompt = prefix + [rng.randrange(1, 1000) for _ in range(rng.randrange(1, 80))]
            output = [rng.randrange(1, 1000) for _ in range(rng.randrange(1, 120))]
            submitted.append(engine.submit(prompt + output, len(prompt)))
        engine.step()
    engine.shut_down()
