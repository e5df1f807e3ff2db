"""Steps of random batches, planned and run, against dense attention over raw tokens.

With the format `raw` the archive holds the same numbers as the recent pages, so whatever split of
a sequence into parts must give what attention over the whole sequence gives: in torch and by the
GPU's kernels (under Triton's interpreter where there is no GPU). With k8v4 the kernels must give
what torch gives on caches of its own. Prefilling sequences attend by FlashAttention on a GPU, here
by a few lines of torch.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from paged import (
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    RAW_BLOCK,
    SCALE,
    PagedSequence,
    make_layer,
    step_tables,
    step_tokens,
)

from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.ops.table import REFERENCE, kernels, make_step
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens, group_prefills
from vllm_kvpca.serving.step.run import run_step

MAX_LENGTH, BLOCKS, PADDING = 320, 60, 2
DTYPE = torch.float16  # the interpreter truncates to bfloat16


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Parts of Triton look at the variable when a kernel runs; see tests/conftest.py."""
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def causal_attention(query, key, value, group, softmax, out):
    """What serving.step.flash.causal_attention does, one sequence after another."""
    starts = group.query_start, group.key_start
    for i in range(len(starts[0]) - 1):
        rows, keys = (slice(int(x[i]), int(x[i + 1])) for x in starts)
        q = query[rows].float().transpose(0, 1)
        k, v = (x[keys].float().transpose(0, 1) for x in (key, value))
        new, length = q.shape[1], k.shape[1]
        assert new <= group.max_new and length <= group.max_length
        scores = q @ k.repeat_interleave(GROUP, 0).transpose(1, 2) * softmax.scale
        hidden = torch.ones(new, length, device=q.device).triu(length - new + 1).bool()
        weights = scores.masked_fill(hidden, -1e30).softmax(-1)
        out[rows] = (weights @ v.repeat_interleave(GROUP, 0)).transpose(0, 1).to(out.dtype)


@dataclass
class Run:
    """A layer's caches for the kernels and for the reference, and what is drawn for them."""

    plan: LayerPlan
    codec: LayerCodec
    rng: random.Random
    device: torch.device

    def __post_init__(self) -> None:
        recent = torch.full(
            (BLOCKS, KV_HEADS, RAW_BLOCK, 2 * HEAD_DIM), float("nan"), dtype=self.plan.dtype
        )
        head_bytes = self.plan.archive.head_bytes
        pages = torch.randint(0, 256, (BLOCKS, KV_HEADS, head_bytes), dtype=torch.uint8)
        self.host = LayerCache(recent.clone(), pages.clone(), self.codec)
        bases = {
            name: x if x is None else x.to(self.device)
            for name, x in (("k_basis", self.codec.k_basis), ("v_basis", self.codec.v_basis))
        }
        codec = replace(self.codec, **bases)
        self.cache = LayerCache(recent.to(self.device), pages.to(self.device), codec)
        self.free = list(range(1, BLOCKS))
        self.rng.shuffle(self.free)

    def by_kernels(self, sequences, counts) -> torch.Tensor:
        """Output of all new tokens, (tokens, heads, head_dim)."""
        from vllm_kvpca.ops.attend.decode import make_workspace
        from vllm_kvpca.ops.attend.kernel import AttendWorkspace

        heads = (KV_HEADS * GROUP, KV_HEADS, HEAD_DIM)
        shape = (2, MAX_LENGTH, KV_HEADS, HEAD_DIM)
        key, value = torch.full(shape, float("nan"), dtype=DTYPE, device=self.device)
        decode = make_workspace(8, *heads, MAX_LENGTH, self.device)
        workspace = AttendWorkspace(decode, key, value, causal_attention)
        step = self._device_step(sequences, counts, decode)
        rows = len(step.slots)
        parts = [self._padded(x, rows) for x in step_tokens(sequences, counts)]
        tokens = StepTokens(*parts, torch.full_like(parts[0], float("nan")))
        run_step(step, tokens, self.cache, Softmax(SCALE), kernels(), workspace)
        return tokens.output[: sum(counts)].cpu()

    def _device_step(self, sequences, counts, workspace) -> StepPlan:
        """As serving.step.plan makes it; decode-only batches end in padding, as CUDA graphs'."""
        from vllm_kvpca.ops.attend.decode import make_chunks

        decodes = sum(count == 1 for count in counts)
        padding = PADDING if decodes == len(counts) else 0
        query_start, lengths, *tables = step_tables(sequences, counts)
        host = query_start.tolist(), lengths.tolist()
        fills = (query_start[-1:], torch.zeros(1), *(torch.zeros(1, 1),) * 2)
        query_start, lengths, *tables = (
            torch.cat([x, fill.expand(padding, *x.shape[1:])]).int().to(self.device)
            for x, fill in zip((query_start, lengths, *tables), fills, strict=True)
        )
        step = make_step(
            kernels(),
            self.plan,
            query_start,
            lengths,
            *tables,
            decodes=decodes + padding,
            prefills=group_prefills(*host, decodes, MAX_LENGTH, (query_start, lengths)),
            chunks=make_chunks(workspace, 8),
        )
        return replace(step, slots=torch.nn.functional.pad(step.slots, (0, padding), value=-1))

    def by_reference(self, sequences, counts) -> torch.Tensor:
        query, key, value = step_tokens(sequences, counts)
        tokens = StepTokens(query, key, value, torch.full_like(query, float("nan")))
        step = make_step(REFERENCE, self.plan, *step_tables(sequences, counts))
        run_step(step, tokens, self.host, Softmax(SCALE), REFERENCE)
        return tokens.output

    def _padded(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        room = torch.full((rows - len(x), *x.shape[1:]), float("nan"), dtype=x.dtype)
        return torch.cat([x, room]).to(self.device)


def random_counts(rng: random.Random, sequences) -> list[int]:
    """New tokens of each; most prompts are long enough to be archived soon."""
    if all(s.computed for s in sequences) and rng.random() < 0.5:
        return [1] * len(sequences)
    return [rng.choice([1, 1, 7, 40] if s.computed else [7, 150, 170]) for s in sequences]


def random_steps(run: Run, steps: int):
    """Grow sequences step by step; yields (sequences, counts) before they are computed."""
    sequences = [PagedSequence(MAX_LENGTH, run.plan.dtype) for _ in range(3)]
    for _ in range(steps):
        batch = [s for s in sequences if run.rng.random() < 0.8 and s.computed < 220]
        if not batch:
            continue
        pairs = list(zip(batch, random_counts(run.rng, batch), strict=True))
        pairs.sort(key=lambda pair: pair[1] > 1)  # decodes first, as vLLM is asked to
        batch, counts = [s for s, _ in pairs], [new for _, new in pairs]
        for sequence, new in zip(batch, counts, strict=True):
            sequence.grow(new, run.plan.policy, run.free)
        yield batch, counts
        for sequence, new in zip(batch, counts, strict=True):
            sequence.computed += new


def make_run(name, thresholds, seed, device, dtype=DTYPE) -> Run:
    torch.manual_seed(seed)
    return Run(*make_layer(name, thresholds, dtype), random.Random(seed), device)


# Rounded once, to float16 (2^-11 of sums of order 1; weights may be float16 too) or bfloat16.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("seed, thresholds", [(0, (96, 48)), (1, (0, 0)), (2, (64, 64))])
@pytest.mark.parametrize("how", ["by_kernels", "by_reference"])
def test_raw_steps_equal_dense_attention(how, seed, thresholds, device):
    steps = 8 if how == "by_kernels" else 25  # the interpreter takes its time
    dtype = DTYPE if how == "by_kernels" else torch.bfloat16
    run = make_run("raw", thresholds, seed, device, dtype)
    for batch, counts in random_steps(run, steps):
        outputs = getattr(run, how)(batch, counts).split(counts)
        for sequence, new, output in zip(batch, counts, outputs, strict=True):
            limit = TOLERANCE[dtype]
            torch.testing.assert_close(
                output.double(), sequence.expected(new), rtol=limit, atol=limit
            )


@pytest.mark.parametrize("seed, thresholds", [(3, (96, 48)), (1, (0, 0))])
def test_compressed_steps_equal_the_references(seed, thresholds, device):
    run = make_run("k8v4", thresholds, seed, device)
    for batch, counts in random_steps(run, 8):
        wanted = run.by_reference(batch, counts)
        output = run.by_kernels(batch, counts)
        # A code next to a tie may differ by one: 1/7 of one component of one token's V.
        torch.testing.assert_close(output.float(), wanted.float(), rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("how", ["by_kernels", "by_reference"])
def test_the_largest_values_stay_finite(how, device):
    """In the archive, too: weights that add up to a little more than 1 must not overflow."""
    run = make_run("k8v4", (0, 0), 0, device)
    sequence = PagedSequence(MAX_LENGTH, DTYPE)
    sequence.value.fill_(torch.finfo(DTYPE).max)
    for new in (120, 1):
        sequence.grow(new, run.plan.policy, run.free)
        assert getattr(run, how)([sequence], [new]).isfinite().all()
        sequence.computed += new
