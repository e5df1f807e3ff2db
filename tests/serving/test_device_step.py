"""The GPU's step under Triton's interpreter: random batches of decodes and prefills.

With the format `raw` any split of a sequence must give dense attention; with k8v4 the host's
step (serving.step) on caches of its own must give the same. Attention of prefilling sequences
is FlashAttention's on a GPU and a few lines of torch here.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch
from paged import (
    ARCHIVE_BLOCK,
    GROUP,
    HEAD_DIM,
    KV_HEADS,
    RAW_BLOCK,
    SCALE,
    PagedSequence,
    step_tokens,
    table,
)

from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.preset import FORMATS, Preset
from vllm_kvpca.serving.step.batch import StepInput, plan_step
from vllm_kvpca.serving.step.device_batch import DeviceStep, group_prefills, on_device
from vllm_kvpca.serving.step.run import StepTokens, run_step

pytest.importorskip("triton")

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


def causal_varlen(
    query, key, value, query_start, key_start, max_query, max_key, scale, soft_cap, out
):
    """What serving.flash.causal_varlen does, one sequence after another."""
    assert soft_cap is None
    for i in range(len(query_start) - 1):
        q = query[query_start[i] : query_start[i + 1]].float().transpose(0, 1)
        k, v = (x[key_start[i] : key_start[i + 1]].float().transpose(0, 1) for x in (key, value))
        new, length = q.shape[1], k.shape[1]
        assert new <= max_query and length <= max_key
        scores = q @ k.repeat_interleave(GROUP, 0).transpose(1, 2) * scale
        hidden = torch.ones(new, length, device=q.device).triu(length - new + 1).bool()
        weights = scores.masked_fill(hidden, -1e30).softmax(-1)
        attention = weights @ v.repeat_interleave(GROUP, 0)
        out[query_start[i] : query_start[i + 1]] = attention.transpose(0, 1).to(out.dtype)


def host_input(sequences, counts, policy) -> StepInput:
    return StepInput(
        query_start=torch.tensor([0, *counts]).cumsum(0),
        lengths=torch.tensor([s.computed + n for s, n in zip(sequences, counts, strict=True)]),
        recent_table=table([s.recent for s in sequences]),
        archive_table=table([s.archive for s in sequences]),
        recent_block=RAW_BLOCK,
        archive_block=ARCHIVE_BLOCK,
        policy=policy,
    )


def vllm_slots(step: StepInput) -> torch.Tensor:
    """Slots as vLLM maps them: into the null block where a token has no raw block."""
    slots = []
    for i, (first, last) in enumerate(zip(step.query_start, step.query_start[1:], strict=False)):
        length = int(step.lengths[i])
        position = torch.arange(length - int(last - first), length)
        ids = step.recent_table[i, position // RAW_BLOCK]
        slots.append(ids * RAW_BLOCK + position % RAW_BLOCK)
    return torch.cat(slots)


def device_step(step: StepInput, device: torch.device) -> DeviceStep:
    """As serving.backend plans it; decode-only batches end in padding rows, as CUDA graphs'."""
    from vllm_kvpca.ops.starts.kernel import list_busy, starts

    counts = step.query_start.diff().tolist()
    decodes = sum(count == 1 for count in counts)
    padding = PADDING if decodes == len(counts) else 0
    query_start, lengths, recent_table, archive_table = (
        torch.cat([x, fill.expand(padding, *x.shape[1:])]).int().to(device)
        for x, fill in (
            (step.query_start, step.query_start[-1:]),
            (step.lengths, torch.zeros(1)),
            (step.recent_table, torch.zeros(1, 1)),
            (step.archive_table, torch.zeros(1, 1)),
        )
    )
    out = torch.empty_like(lengths)
    starts(query_start, lengths, recent_table, RAW_BLOCK, step.policy, out)
    busy = torch.empty(len(lengths) + 1, dtype=torch.int32, device=device)
    list_busy(out, lengths, step.policy, busy)
    groups = group_prefills(step.query_start.tolist(), step.lengths.tolist(), decodes, MAX_LENGTH)
    slots = torch.nn.functional.pad(vllm_slots(step), (0, padding), value=-1)
    return DeviceStep(
        policy=step.policy,
        decodes=decodes + padding,
        prefills=tuple(on_device(group, query_start, lengths) for group in groups),
        query_start=query_start,
        lengths=lengths,
        starts=out,
        busy=busy,
        slots=slots.to(device),
        recent_table=recent_table,
        archive_table=archive_table,
    )


@dataclass
class Run:
    """Caches of the device's step and of the host's, and what is drawn for them."""

    policy: Policy
    codec: LayerCodec
    rng: random.Random
    device: torch.device

    def __post_init__(self) -> None:
        from vllm_kvpca.ops.attend.decode import make_workspace
        from vllm_kvpca.serving.step.device_step import DeviceWorkspace, LayerCache

        recent = torch.full((BLOCKS, KV_HEADS, RAW_BLOCK, 2 * HEAD_DIM), float("nan"), dtype=DTYPE)
        head_bytes = self.codec.layout.head_bytes
        pages = torch.randint(0, 256, (BLOCKS, KV_HEADS, head_bytes), dtype=torch.uint8)
        self.recent, self.pages = recent.clone(), pages.clone()
        codec = self.codec
        bases = (
            x.to(self.device) if x is not None else None for x in (codec.k_basis, codec.v_basis)
        )
        k_basis, v_basis = bases
        codec = replace(codec, k_basis=k_basis, v_basis=v_basis)
        self.cache = LayerCache(recent.to(self.device), pages.to(self.device), codec)
        nan = float("nan")
        shape = (2, MAX_LENGTH, KV_HEADS, HEAD_DIM)
        key, value = torch.full(shape, nan, dtype=DTYPE, device=self.device)
        heads = KV_HEADS * GROUP
        partial = make_workspace(8, heads, KV_HEADS, HEAD_DIM, MAX_LENGTH, self.device)
        self.workspace = DeviceWorkspace(partial, key, value)
        self.free = list(range(1, BLOCKS))
        self.rng.shuffle(self.free)

    def on_device(self, sequences, counts) -> torch.Tensor:
        """Output of all new tokens, (tokens, heads, head_dim)."""
        from vllm_kvpca.serving.step.device_step import run_device_step

        step = device_step(host_input(sequences, counts, self.policy), self.device)
        rows = len(step.slots)
        parts = [self._padded(x, rows) for x in step_tokens(sequences, counts)]
        tokens = StepTokens(*parts, torch.full_like(parts[0], float("nan")))
        run_device_step(step, tokens, self.cache, self.workspace, causal_varlen, SCALE)
        return tokens.output[: sum(counts)].cpu()

    def on_host(self, sequences, counts) -> torch.Tensor:
        query, key, value = step_tokens(sequences, counts)
        tokens = StepTokens(query, key, value, torch.full_like(query, float("nan")))
        step = plan_step(host_input(sequences, counts, self.policy))
        run_step(step, tokens, self.recent, self.pages, self.codec, SCALE)
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
    sequences = [PagedSequence(MAX_LENGTH, DTYPE) for _ in range(3)]
    for _ in range(steps):
        batch = [s for s in sequences if run.rng.random() < 0.8 and s.computed < 220]
        if not batch:
            continue
        pairs = list(zip(batch, random_counts(run.rng, batch), strict=True))
        pairs.sort(key=lambda pair: pair[1] > 1)  # decodes first, as vLLM is asked to
        batch, counts = [s for s, _ in pairs], [new for _, new in pairs]
        for sequence, new in zip(batch, counts, strict=True):
            sequence.grow(new, run.policy, run.free)
        yield batch, counts
        for sequence, new in zip(batch, counts, strict=True):
            sequence.computed += new


def make_run(name: str, thresholds: tuple[int, int], seed: int, device: torch.device) -> Run:
    torch.manual_seed(seed)
    preset = Preset(name, FORMATS[name])
    k, v = (preset.basis(which, 0, list(range(KV_HEADS)), HEAD_DIM) for which in "kv")
    codec = LayerCodec(preset.layout(HEAD_DIM, ARCHIVE_BLOCK), k, v, DTYPE)
    return Run(Policy(*thresholds, align=ARCHIVE_BLOCK), codec, random.Random(seed), device)


@pytest.mark.parametrize("seed, thresholds", [(0, (96, 48)), (1, (0, 0)), (2, (64, 64))])
def test_raw_steps_equal_dense_attention(seed, thresholds, device):
    run = make_run("raw", thresholds, seed, device)
    for batch, counts in random_steps(run, 8):
        outputs = run.on_device(batch, counts).split(counts)
        for sequence, new, output in zip(batch, counts, outputs, strict=True):
            # Rounded to float16 once: 2^-11 of sums of order 1; weights may be float16 too.
            torch.testing.assert_close(
                output.double(), sequence.expected(new), rtol=2e-3, atol=2e-3
            )


@pytest.mark.parametrize("seed, thresholds", [(3, (96, 48)), (1, (0, 0))])
def test_compressed_steps_equal_the_hosts(seed, thresholds, device):
    run = make_run("k8v4", thresholds, seed, device)
    for batch, counts in random_steps(run, 8):
        wanted = run.on_host(batch, counts)
        output = run.on_device(batch, counts)
        # A code next to a tie may differ by one: 1/7 of one component of one token's V.
        torch.testing.assert_close(output.float(), wanted.float(), rtol=5e-3, atol=5e-3)
