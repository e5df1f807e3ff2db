"""Decode steps over filled caches, for the decode kernel and its reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from kernel_cases import FORMATS as ALL_FORMATS
from kernel_cases import add_bias, make_codec, make_plan

from vllm_kvpca.ops.archive.reference import archive_slots
from vllm_kvpca.ops.attend import reference
from vllm_kvpca.ops.attend.decode import DecodeWorkspace, decode, make_chunks, make_workspace
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.store.reference import store_slots
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.step_plan import StepPlan, StepTokens

RAW_BLOCK = 32
FORMATS = [name for name in ALL_FORMATS if name != "plain-mixed"]
NEVER = Policy(10**7, 0, 1)
FAR = 1 << 30
"""A block id that nobody may look at."""


@dataclass
class DecodeCase:
    """One decode step: everything that the op takes."""

    step: StepPlan
    tokens: StepTokens
    cache: LayerCache
    softmax: Softmax
    workspace: DecodeWorkspace

    def run(self) -> torch.Tensor:
        decode(self.step, self.tokens, self.cache, self.softmax, self.workspace)
        return self.tokens.output

    def expected(self) -> torch.Tensor:
        """(sequences, heads, head_dim) float32 by the reference; zero for padding."""
        step, tokens = self.step, self.tokens
        live = step.lengths > 0
        output = torch.zeros_like(tokens.output, dtype=torch.float32)
        if not live.any():
            return output
        rows = torch.nn.functional.pad(live.cumsum(0, dtype=torch.int32), (1, 0))
        few = StepTokens(*(x[live] for x in (tokens.query, tokens.key, tokens.value)), output[live])
        plan = replace(step, query_start=rows, _shared={})
        reference.attend(plan, few, self.cache, self.softmax)
        output[live] = few.output
        return output

    def error(self) -> float:
        """Largest relative RMS error over sequences; a write that is missing gives NaN."""
        wanted, got = self.expected(), self.run().float()
        difference = (got - wanted).square().mean((1, 2)).sqrt()
        return float((difference / wanted.square().mean((1, 2)).sqrt().clamp_min(1e-6)).max())


def make_case(
    name, dim, group, starts, recents, dtype, device, kv_heads=2, block=48, cap=None, seed=0
) -> DecodeCase:
    """Random tokens in pages at random places; unused bytes and buffers are NaN or 255.

    Args:
        starts: archived tokens of each sequence. recents: raw ones before the new one; None makes
            a row of padding.
    """
    torch.manual_seed(seed)
    codec = make_codec(name, dim, kv_heads, dtype, device, block)
    heads, batch = kv_heads * group, len(starts)
    a_rows = [-(-s // block) for s in starts]
    r_rows = [
        -(-(s + r) // RAW_BLOCK) - s // RAW_BLOCK if r else 0
        for s, r in zip(starts, recents, strict=True)
    ]
    widths = max(a_rows) + 2, max(a_rows) * block // RAW_BLOCK + max(r_rows) + 2
    a_table, r_table = (torch.full((batch, w), FAR, dtype=torch.int32) for w in widths)
    head_bytes = codec.layout.head_bytes
    pages = torch.full((sum(a_rows) + 4, kv_heads, head_bytes + 192), 255, dtype=torch.uint8)
    pages = pages.to(device)[:, :, :head_bytes]
    size = (sum(r_rows) + 4, kv_heads, RAW_BLOCK, 2 * dim)
    recent = torch.full(size, float("nan"), dtype=dtype, device=device)
    a_free, r_free = (
        iter((torch.randperm(sum(rows) + 3) + 1).tolist()) for rows in (a_rows, r_rows)
    )
    for i, (start, count) in enumerate(zip(starts, recents, strict=True)):
        for j in range(a_rows[i]):
            a_table[i, j] = next(a_free)
        for j in range(start // RAW_BLOCK, start // RAW_BLOCK + r_rows[i]):
            r_table[i, j] = next(r_free)
        key, value = torch.randn(2, start + (count or 0), kv_heads, dim, device=device).to(dtype)
        positions = torch.arange(len(key), device=device)
        key = add_bias(codec, key, positions)
        slots = slots_of(a_table[i], block, 0, start, device)
        archive_slots(pages, key[:start], value[:start], slots, positions[:start], codec)
        slots = slots_of(r_table[i], RAW_BLOCK, start, len(key), device)
        store_slots(recent, key[start:], value[start:], slots)
    lengths = [0 if r is None else s + r + 1 for s, r in zip(starts, recents, strict=True)]
    ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths)]
    longest = max(*lengths, 1)
    workspace = make_workspace(
        batch,
        heads,
        kv_heads,
        dim,
        longest,
        torch.device(device),
        key_bias=codec.k_bias is not None,
    )
    for x in (workspace.sums, workspace.maxima, workspace.weights, workspace.rotated):
        x.fill_(float("nan"))
    chunks = make_chunks(workspace, batch)
    for x in (chunks.chunks, chunks.spans):
        x.fill_(FAR)
    step = StepPlan(
        layer=make_plan(codec, RAW_BLOCK, NEVER),
        query_start=torch.arange(batch + 1, dtype=torch.int32, device=device),
        lengths=ints[1],
        starts=ints[0],
        busy=torch.zeros(batch + 1, dtype=torch.int32, device=device),
        slots=torch.full((batch,), -1, device=device),
        recent_table=r_table.to(device),
        archive_table=a_table.to(device),
        decodes=batch,
        chunks=chunks,
    )
    qkv = torch.randn(batch, heads + 2 * kv_heads, dim, device=device).to(dtype)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], 1)
    key.copy_(add_bias(codec, key, (ints[1] - 1).clamp_min(0)))
    tokens = StepTokens(query, key, value, torch.full_like(query, float("nan")))
    cache = LayerCache(recent, pages, codec)
    return DecodeCase(step, tokens, cache, Softmax(dim**-0.5, cap), workspace)


def slots_of(table, block, first, last, device) -> torch.Tensor:
    """Slots of positions [first, last) of one sequence."""
    position = torch.arange(first, last)
    return (table.long()[position // block] * block + position % block).to(device)
