"""A shadow of the paged memory under vLLM's own KVCacheManager.

`Engine` schedules sequences as vLLM does: chunked prefill, prefix hits, preemption, and
steps that run on the worker only after later ones were scheduled. `Worker` plans each step
with the ops' own reference and moves, instead of K and V, the identity of each token: a number
that stands for the token and all tokens before it. `ShadowMemory` refuses to read what is not
there any more and to write over what is still there.

A model is a `Mix`: pairs of recent and archive groups, each with block sizes of its own, and
groups of vLLM's own kinds beside them: sliding windows, chunks of local attention, and states of
Mamba or linear attention. The state after some tokens is the identity of the last of them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from vllm import SamplingParams
from vllm.model_executor.layers.mamba.checkpoint import compute_mamba_prefill_checkpoints
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowSpec,
)
from vllm.v1.request import Request, RequestStatus

from vllm_kvpca.codec.bands import Band
from vllm_kvpca.ops.archive.reference import moves_of
from vllm_kvpca.ops.attend.buckets import Bucket, buckets
from vllm_kvpca.ops.table import REFERENCE, make_step
from vllm_kvpca.pages.block_sizes import BlockSizes, peak_raw_blocks
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layer_plan import LayerPlan, Stream
from vllm_kvpca.pages.step_plan import StepPlan
from vllm_kvpca.serving.cache.pairs import ARCHIVE_SUFFIX
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.register import register

HEAD_SIZE = 8
MAX_MODEL_LEN = 4096
BUDGET = 256
MAX_RUNNING = 8


class ShadowError(AssertionError):
    """The memory does not hold what a step reads, or holds what a step writes over."""


def make_specs(
    plan: BlockSizes, compress_after: int, keep_recent: int, batches: int = 1
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
    }
    recent = RecentSpec(block_size=plan.raw_block, batches=batches, **common)
    return recent, ArchiveSpec(block_size=plan.archive_block, **common)


@dataclass(frozen=True)
class Mix:
    """Kinds of layers of a model.

    Attributes:
        pairs: block sizes of each pair of groups.
        windows: (tokens per block, sliding window) of each group beside them.
        chunks: (tokens per block, chunk) of each group with chunked local attention.
        states: tokens per block of each group of states, which are kept at the ends of blocks
            (vLLM's mode "align").
        inner: whether a prompt's last step also leaves the state at the end of its last block.
    """

    pairs: tuple[BlockSizes, ...]
    windows: tuple[tuple[int, int], ...] = ()
    chunks: tuple[tuple[int, int], ...] = ()
    states: tuple[int, ...] = ()
    inner: bool = False

    @property
    def sizes(self) -> list[int]:
        """Tokens per block of every group, in the order of the groups."""
        sizes = [size for plan in self.pairs for size in (plan.raw_block, plan.archive_block)]
        return sizes + [block for block, _ in self.windows + self.chunks] + list(self.states)

    @property
    def slots(self) -> list[int]:
        """Identities per page of every group: a state is one."""
        return self.sizes[: len(self.sizes) - len(self.states)] + [1] * len(self.states)

    def own_specs(self) -> list[KVCacheSpec]:
        """Specs of vLLM's own groups."""
        shape = {"num_kv_heads": 1, "head_size": HEAD_SIZE, "dtype": torch.bfloat16}
        windows = [
            SlidingWindowSpec(block_size=block, sliding_window=window, **shape)
            for block, window in self.windows
        ]
        chunks = [
            ChunkedLocalAttentionSpec(block_size=block, attention_chunk_size=chunk, **shape)
            for block, chunk in self.chunks
        ]
        states = [
            MambaSpec(
                block_size=block,
                shapes=((HEAD_SIZE,),),
                dtypes=(torch.bfloat16,),
                mamba_cache_mode="align",
                num_prefill_checkpoint_blocks=int(self.inner),
                prefill_checkpoint_alignment=1 if self.inner else None,
            )
            for block in self.states
        ]
        return [*windows, *chunks, *states]

    @property
    def hash_block(self) -> int:
        return math.gcd(*self.sizes)


def make_manager(
    specs: list[tuple[RecentSpec, ArchiveSpec]],
    blocks: int,
    caching: bool = True,
    own: Iterable[KVCacheSpec] = (),
) -> KVCacheManager:
    """vLLM's manager over a pool of `blocks` pages, the null block included.

    Args:
        own: specs of vLLM's own groups.
    """
    register()
    init_none_hash(sha256)
    groups = []
    for number, (recent, archive) in enumerate(specs):
        name = f"layer.{number}"
        groups.append(KVCacheGroupSpec([name], recent))
        groups.append(KVCacheGroupSpec([name + ARCHIVE_SUFFIX], archive))
    groups += [KVCacheGroupSpec([f"own.{number}"], spec) for number, spec in enumerate(own)]
    sizes = [group.kv_cache_spec.block_size for group in groups]
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
    """Which token each slot of each group's pages holds; 0 is nothing."""

    def __init__(self, blocks: int, sizes: list[int]) -> None:
        self.content = [torch.zeros(blocks, size, dtype=torch.long) for size in sizes]
        self.owner = torch.full((blocks,), -1)
        """The group that has written to a page, -1 if none has."""
        self.in_use = torch.zeros(blocks, dtype=torch.bool)

    def hand_over(self, new_blocks: list[int], in_use: torch.Tensor) -> None:
        """Begin a step: blocks that changed hands lose their content."""
        for content in self.content:
            content[new_blocks] = 0
        self.owner[new_blocks] = -1
        self.in_use = in_use

    def _locate(self, group: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size = self.content[group].shape[1]
        block = torch.div(slots, size, rounding_mode="floor")
        if (block <= 0).any():
            raise ShadowError(f"group {group}: the null block is used")
        if not self.in_use[block].all():
            raise ShadowError(f"group {group}: a block is used after it was freed")
        return block, slots % size

    def write(self, group: int, slots: torch.Tensor, identity: torch.Tensor) -> None:
        """Fill empty slots; nothing is ever written twice."""
        block, offset = self._locate(group, slots)
        if ((self.owner[block] >= 0) & (self.owner[block] != group)).any():
            raise ShadowError(f"group {group}: a page of another group is overwritten")
        if self.content[group][block, offset].any():
            raise ShadowError(f"group {group}: a token is overwritten")
        self.owner[block] = group
        self.content[group][block, offset] = identity

    def keep(self, group: int, blocks: torch.Tensor, identity: torch.Tensor) -> None:
        """Put states into pages, over earlier ones of the same sequences."""
        self._locate(group, blocks)
        self.owner[blocks] = group
        self.content[group][blocks, 0] = identity

    def read(self, group: int, slots: torch.Tensor) -> torch.Tensor:
        """Identities in the given slots, all of which must hold a token."""
        block, offset = self._locate(group, slots)
        identity = self.content[group][block, offset]
        if not identity.all():
            raise ShadowError(f"group {group}: an empty slot is read")
        return identity


class Sequence:
    """One request: its true tokens, what vLLM knows of them, and the worker's block tables."""

    def __init__(self, request: Request, tokens: list[int], identity: list[int], target: int):
        self.request = request
        self.tokens = tokens
        self.identity = torch.tensor(identity)
        self.target = target
        self.tables: list[list[int]] = []
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
    tables: list[list[int]]
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

    def __init__(
        self, memory: ShadowMemory, mix: Mix, plans: list[LayerPlan], hit_step: int
    ) -> None:
        self.memory = memory
        self.mix = mix
        self.plans = plans
        self.hit_step = hit_step
        self.archived = 0

    def run(self, step: ScheduledStep) -> None:
        """What every kind of layer does in a step, on identities."""
        self.memory.hand_over(step.new_blocks, step.in_use)
        if not step.parts:
            return
        new = torch.cat([p.sequence.identity[p.computed : p.length] for p in step.parts])
        for pair in range(len(self.mix.pairs)):
            self._run_pair(pair, step.parts, new)
        groups = itertools.count(2 * len(self.mix.pairs))
        for _, window in self.mix.windows:
            self._run_part(next(groups), lambda n, w=window: max(0, n - w + 1), step.parts)
        for _, chunk in self.mix.chunks:
            self._run_part(next(groups), lambda n, c=chunk: n // c * c, step.parts)
        for block in self.mix.states:
            self._run_state(next(groups), block, step.parts)

    def _run_pair(self, pair: int, parts: list[Part], new: torch.Tensor) -> None:
        """Store, archive and attend as the ops do."""
        work = self._plan(pair, parts)
        recent, archive = 2 * pair, 2 * pair + 1
        stored = work.slots >= 0
        self.memory.write(recent, work.slots[stored], new[stored])
        moves = moves_of(work)
        old = self.memory.read(recent, moves.old)
        self.memory.write(archive, moves.slots, torch.cat([old, new[moves.new]]))
        self.archived += len(moves.slots)
        self._attend(recent, archive, buckets(work), parts)

    def _run_part(self, group: int, first_seen: Callable[[int], int], parts: list[Part]) -> None:
        """Store all new tokens and attend to the last ones, as vLLM's own layers do.

        Args:
            first_seen: of a new token's position, the first that it attends to.
        """
        size = self.memory.content[group].shape[1]
        for part in parts:
            table = torch.tensor(part.tables[group])
            first = first_seen(part.computed)
            position = torch.arange(first, part.length)
            slots = table[position // size] * size + position % size
            seen = part.computed - first
            identity = part.sequence.identity
            if not torch.equal(self.memory.read(group, slots[:seen]), identity[first:][:seen]):
                raise ShadowError(f"{part.sequence.request.request_id} sees other tokens")
            self.memory.write(group, slots[seen:], identity[part.computed : part.length])

    def _run_state(self, group: int, size: int, parts: list[Part]) -> None:
        """Go on from the state in the last block's page, as vLLM's Mamba layers do."""
        inner = compute_mamba_prefill_checkpoints(
            [part.length for part in parts],
            [part.new for part in parts],
            hash_block_size=self.mix.hash_block,
            mamba_block_size=size,
            checkpoint_alignment=1 if self.mix.inner else None,
            drop_eagle_block=False,
            cache_hit_alignment_tokens=self.hit_step,
        )
        for part, offset, column in zip(parts, *inner, strict=True):
            table, identity = torch.tensor(part.tables[group]), part.sequence.identity
            ends = [part.length] + [part.computed + offset] * (column >= 0)
            if part.computed:
                before = self.memory.read(group, table[[(part.computed - 1) // size]])
                if before != identity[part.computed - 1]:
                    raise ShadowError(
                        f"{part.sequence.request.request_id} goes on from another state"
                    )
            rows = [(part.length - 1) // size] + [column] * (column >= 0)
            self.memory.keep(group, table[rows], identity[[end - 1 for end in ends]])

    def _plan(self, pair: int, parts: list[Part]) -> StepPlan:
        return make_step(
            REFERENCE,
            self.plans[pair],
            torch.tensor([0] + [p.new for p in parts]).cumsum(0).int(),
            torch.tensor([p.length for p in parts], dtype=torch.int32),
            _table([p.tables[2 * pair] for p in parts]),
            _table([p.tables[2 * pair + 1] for p in parts]),
        )

    def _attend(self, recent: int, archive: int, groups: list[Bucket], parts: list[Part]) -> None:
        """Every sequence must see its own prefix, from the archive and the recent part."""
        first = torch.tensor([0] + [p.new for p in parts]).cumsum(0)
        seen = []
        for bucket in groups:
            seen.append(bucket.tokens[bucket.valid])
            for row, token in enumerate(bucket.tokens[:, 0]):
                part = parts[int((first == token).nonzero()[-1])]
                archived, skipped, raw = (
                    int(x[row])
                    for x in (bucket.archive_lengths, bucket.recent_skips, bucket.recent_lengths)
                )
                prefix = torch.cat(
                    [
                        self._read(archive, bucket.archive_table, row, 0, archived),
                        self._read(recent, bucket.recent_table, row, skipped, raw),
                    ]
                )
                if not torch.equal(prefix, part.sequence.identity[: part.computed]):
                    raise ShadowError(f"{part.sequence.request.request_id} sees other tokens")
        if not torch.equal(torch.cat(seen).sort().values, torch.arange(int(first[-1]))):
            raise ShadowError("new tokens attend twice or not at all")

    def _read(
        self, group: int, table: torch.Tensor | None, row: int, skipped: int, length: int
    ) -> torch.Tensor:
        position = torch.arange(skipped, skipped + length)
        if table is None:
            if len(position):
                raise ShadowError(f"group {group}: tokens without a block table")
            return position
        size = self.memory.content[group].shape[1]
        return self.memory.read(group, table[row, position // size] * size + position % size)


def _table(rows: list[list[int]]) -> torch.Tensor:
    width = max(1, *(len(row) for row in rows)) + 16  # wider than needed, as vLLM's are
    return torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.int32)


class Engine:
    """A small scheduler over vLLM's KVCacheManager, with `lag` steps in flight.

    With `reserve` a request is admitted only if all of its prompt fits (vLLM's default).
    `counts` says what a run exercised: hits, mixed_hits (through both groups of the first pair),
    inner_hits (that end inside a raw block), preemptions, finished.
    """

    def __init__(
        self,
        mix: Mix,
        compress_after: int,
        keep_recent: int,
        *,
        lag: int,
        blocks: int,
        caching: bool = True,
        reserve: bool = True,
    ) -> None:
        self.mix = mix
        self.reserve = reserve
        specs = [make_specs(plan, compress_after, keep_recent, lag + 1) for plan in mix.pairs]
        self.policies = [recent.policy for recent, _ in specs]
        self.manager = make_manager(specs, blocks, caching, mix.own_specs())
        self.managers = self.manager.coordinator.single_type_managers
        self.recents = self.managers[: 2 * len(mix.pairs) : 2]
        self.archives = self.managers[1 : 2 * len(mix.pairs) : 2]
        self.pool = self.manager.block_pool
        plans = [recent.plan for recent, _ in specs]
        self._as_vllm_scheduler = self._scheduler_settings()
        self.worker = Worker(ShadowMemory(blocks, mix.slots), mix, plans, self._hit_step())
        self.lag = lag
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.in_flight: deque[ScheduledStep] = deque()
        self.counts: Counter[str] = Counter()
        self.hits: list[int] = []
        """Tokens that each admitted request found in the prefix cache."""
        self._identities: dict[tuple[int, int], int] = {}
        self._names = 0
        self._new_blocks: list[int] = []
        hand_out = self.pool.get_new_blocks

        def record(count: int) -> list:
            given = hand_out(count)
            self._new_blocks.extend(block.block_id for block in given)
            return given

        self.pool.get_new_blocks = record

    def _hit_step(self) -> int:
        """What vLLM tells its workers."""
        config = SimpleNamespace(
            cache_config=SimpleNamespace(enable_prefix_caching=self.manager.enable_caching),
            parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        )
        sizes = math.lcm(*self.mix.sizes), self.mix.hash_block
        return core.resolve_cache_hit_alignment_tokens(self.manager.kv_cache_config, config, *sizes)

    def _scheduler_settings(self) -> SimpleNamespace:
        """What vLLM's scheduler looks at where a step has to end for the sake of states."""
        return SimpleNamespace(
            cache_config=SimpleNamespace(block_size=max(self.mix.states, default=1)),
            scheduler_config=SimpleNamespace(long_prefill_token_threshold=0),
            block_size=math.lcm(*self.mix.sizes),
            hash_block_size=self.mix.hash_block,
            max_num_scheduled_tokens=BUDGET,
            mamba_partial_cache_hit=self.manager.coordinator.enable_partial_hash_hits,
            mamba_has_prefill_checkpoint_blocks=self.mix.inner,
            mamba_prefill_checkpoint_alignment=1 if self.mix.inner else None,
            mamba_shared_prefix_checkpoint=False,
            use_eagle_block_drop=False,
            num_hash_lookahead_tokens=0,
        )

    def _split(self, request: Request, new: int, computed: int = 0) -> int:
        """Of `new` tokens, those up to where a state has to be kept."""
        if not self.mix.states:
            return new
        return Scheduler._mamba_block_aligned_split(self._as_vllm_scheduler, request, new, computed)

    def submit(self, tokens: list[int], prompt: int) -> Sequence:
        """Queue a request; it ends when all of `tokens` are known."""
        target = len(tokens)
        tokens = tokens + [0] * (self.lag + 1)  # computed in vain while the end is in flight
        identity, last = [], 0
        for token in tokens:
            last = self._identities.setdefault((last, token), len(self._identities) + 1)
            identity.append(last)
        self._names += 1
        request = make_request(str(self._names), tokens[:prompt], self.mix.hash_block)
        sequence = Sequence(request, tokens, identity, target)
        self.waiting.append(sequence)
        return sequence

    def step(self) -> None:
        """Schedule a step, run those that are due, check the managers' books."""
        step, budget, preempted = ScheduledStep(), BUDGET, False
        self.manager.new_step_starts()
        for sequence in list(self.running):
            if sequence in self.running and budget and sequence.pending:
                new = self._split(sequence.request, min(budget, sequence.pending))
                if not new:
                    continue
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
        hit_rows = [0] * len(sequence.tables)
        self._check_no_waste(sequence, new, [len(group) for group in blocks.blocks], hit_rows)
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
        hits, length, request.shared_prefix_boundary = self.manager.get_computed_blocks(request)
        new = self._split(request, min(budget, request.num_tokens - length), length)
        if not new:
            return False
        blocks = self.manager.allocate_slots(
            request, new, length, hits, full_sequence_must_fit=self.reserve
        )
        if blocks is None:
            return False
        self.running.append(self.waiting.popleft())
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = length
        sequence.admissions += 1
        sequence.tables = [list(ids) for ids in self.manager.get_block_ids(request.request_id)]
        hit_rows = [len(group) for group in hits.blocks]
        added = [len(t) - rows for t, rows in zip(sequence.tables, hit_rows, strict=True)]
        self._check_no_waste(sequence, new, added, hit_rows)
        self.hits.append(length)
        self.counts["hits"] += length > 0
        self.counts["inner_hits"] += any(length % plan.raw_block for plan in self.mix.pairs)
        raw_hits = sum(not block.is_null for block in hits.blocks[0])
        self.counts["mixed_hits"] += raw_hits > 0 and hit_rows[1] > 0
        step.parts.append(self._dispatch(sequence, new))
        return True

    def _dispatch(self, sequence: Sequence, new: int) -> Part:
        request = sequence.request
        samples = new == sequence.pending
        tables = [list(table) for table in sequence.tables]
        part = Part(
            sequence, sequence.admissions, request.num_computed_tokens, new, tables, samples
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
        for manager in self.managers:
            assert not manager.req_to_blocks and not manager.num_cached_block
        for manager in (*self.recents, *self.archives):
            assert not manager.held and not manager.uses, "held blocks that nobody has"
        for recent, archive in zip(self.recents, self.archives, strict=True):
            assert not recent._freed_below and not recent._hit_ends_in and not archive.sequences

    def check_books(self) -> None:
        """`held` counts what sequences hold, the pool agrees, and no sequence holds too much."""
        uses: Counter[int] = Counter()
        for manager in self.managers:
            held: Counter[int] = Counter()
            for rows in manager.req_to_blocks.values():
                held.update(block.block_id for block in rows if not block.is_null)
            if manager in (*self.recents, *self.archives):
                assert manager.held == held, "held differs from the blocks in use"
                assert manager.uses == held.total(), "uses differs from the blocks in use"
            uses += held
        for block in self.pool.blocks[1:]:
            assert block.ref_cnt == uses[block.block_id], "the pool counts other users"
        for sequence, manager in itertools.product(self.running, self.recents):
            request = sequence.request
            rows = manager.req_to_blocks.get(request.request_id, ())
            raw = sum(not block.is_null for block in rows)
            peak = manager.kv_cache_spec.peak_blocks(request.num_computed_tokens)
            assert raw <= peak, f"{raw} raw blocks, peak_blocks allows {peak}"

    def _check_no_waste(
        self, sequence: Sequence, new: int, added: list[int], hit_rows: list[int]
    ) -> None:
        """New raw blocks lie above the boundary, new archive blocks below it."""
        for pair, plan in enumerate(self.mix.pairs):
            recent, archive = sequence.tables[2 * pair : 2 * pair + 2]
            new_raw, new_archive = added[2 * pair : 2 * pair + 2]
            boundary = self.policies[pair].boundary(sequence.request.num_computed_tokens + new)
            first = len(recent) - new_raw
            for row, block in enumerate(recent[first:], first):
                assert not block or row >= boundary // plan.raw_block, "raw block in vain"
            rows = -(-boundary // plan.archive_block)
            held = max(rows, hit_rows[2 * pair + 1], len(archive) - new_archive)
            assert len(archive) <= held, "archive block in vain"


def peak_blocks(plan: BlockSizes, policy: Policy, max_model_len: int, batches: int = 1) -> int:
    """Blocks that a pool must have so that one sequence can always go on."""
    archive = -(-policy.boundary(max_model_len) // plan.archive_block)
    return archive + peak_raw_blocks(policy, plan.raw_block, max_model_len, batches)


def pool_for(mix: Mix, thresholds: tuple[int, int], longest: int, batches: int) -> int:
    """Blocks that the longest sequence needs, over all groups."""
    blocks = 1
    for plan in mix.pairs:
        blocks += peak_blocks(plan, Policy(*thresholds, plan.align), longest, batches)
    for block, window in mix.windows + mix.chunks:
        blocks += -(-min(window + batches * BUDGET, longest) // block) + 1
    return blocks + len(mix.states) * (2 + mix.inner)


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
