"""Check and time the decode kernel on a GPU: python tests/gpu/check_decode.py [STEP[:FORMAT]] ...

Not collected by pytest: needs a GPU. `check` compares with ops.reference over formats,
shapes and dtypes; `sweep` times tunings; `time` times the shapes of docs/performance.md.
Times are medians of CUDA graph replays that walk over copies of the cache larger than L2.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from fractions import Fraction

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vllm_kvpca.codec.bands import RAW_BITS, resolve_bands
from vllm_kvpca.ops import merge, reference
from vllm_kvpca.ops.attend.decode import (
    DecodeWorkspace,
    Tuning,
    decode,
    launches,
    make_workspace,
    plan_decode,
)
from vllm_kvpca.ops.dependent_launch import LEAST_CAPABILITY
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.layout import ArchiveLayout

FORMATS = {
    "raw": (((1, 16),), ((1, 16),)),
    "k8v8": (((1, 8),), ((1, 8),)),
    "k8v4": (((1, 8),), ((1, 4),)),
    "v-mixed": (((1, 16),), ((3 / 8, 8), (5 / 8, 4))),
    "v-rank-int8": (((1, 16),), ((3 / 4, 8), (1 / 4, 0))),
    "k-mixed": (((1 / 4, 8), (3 / 4, 4)), ((1 / 4, 8), (3 / 4, 4))),
}
L2_BYTES = 50e6
DEVICE = "cuda"


@dataclass
class Case:
    """Inputs of one decode() call, and its output."""

    args: tuple
    starts: torch.Tensor
    codec: LayerCodec
    scale: float
    cap: float | None
    out: torch.Tensor
    workspace: DecodeWorkspace

    def plan(self) -> None:
        recent, lengths = self.args[3], self.args[-1]
        layout = self.codec.layout
        plan_decode(self.starts, lengths, layout, recent.shape[2], self.workspace)

    def run(self) -> torch.Tensor:
        decode(*self.args, self.codec, self.scale, self.cap, self.out, self.workspace)
        return self.out


def bands(spec, dim):
    return resolve_bands([(Fraction(share), bits) for share, bits in spec], dim)


def make_codec(name, dim, kv_heads, block, dtype, device=None, k_basis=True):
    """Random orthonormal bases wherever the format is not raw."""
    device = device or DEVICE
    k, v = (bands(spec, dim) for spec in FORMATS[name])

    def basis(of):
        if of[0].bits == RAW_BITS:
            return None
        return torch.linalg.qr(torch.randn(kv_heads, dim, dim))[0].contiguous().to(device)

    return LayerCodec(
        ArchiveLayout(dim, block, k, v), basis(k) if k_basis else None, basis(v), dtype
    )


def make_case(name, dim, group, starts, recents, dtype, kv_heads=2, block=80, raw_block=32,
              cap=None, tuning=None, device=None, seed=0):  # fmt: skip
    """Random tokens in pages at random places; unused bytes and buffers are NaN or 255.

    A `recents` of None makes a row of padding.
    """
    torch.manual_seed(seed)
    device = device or DEVICE
    codec = make_codec(name, dim, kv_heads, block, dtype, device)
    heads, batch = kv_heads * group, len(starts)
    a_rows = [-(-s // block) for s in starts]
    r_rows = [-(-(s + r) // raw_block) - s // raw_block if r else 0
              for s, r in zip(starts, recents, strict=True)]  # fmt: skip
    a_table = torch.full((batch, max(a_rows) + 2), 1 << 30, dtype=torch.int32)
    r_table = torch.full((batch, max(a_rows) * block // raw_block + max(r_rows) + 2), 1 << 30,
                         dtype=torch.int32)  # fmt: skip
    head_bytes = codec.layout.head_bytes
    pages = torch.full((sum(a_rows) + 4, kv_heads, head_bytes + 192), 255, dtype=torch.uint8,
                       device=device)[:, :, :head_bytes]  # fmt: skip
    recent = torch.full((sum(r_rows) + 4, kv_heads, raw_block, 2 * dim), float("nan"),
                        dtype=dtype, device=device)  # fmt: skip
    a_free = iter((torch.randperm(sum(a_rows) + 3) + 1).tolist())
    r_free = iter((torch.randperm(sum(r_rows) + 3) + 1).tolist())
    for i, (start, count) in enumerate(zip(starts, recents, strict=True)):
        for j in range(a_rows[i]):
            a_table[i, j] = next(a_free)
        for j in range(start // raw_block, start // raw_block + r_rows[i]):
            r_table[i, j] = next(r_free)
        tokens = torch.randn(2, start + (count or 0), kv_heads, dim, device=device).to(dtype)
        for first, last, table, size in (
            (0, start, a_table, block),
            (start, start + (count or 0), r_table, raw_block),
        ):
            position = torch.arange(first, last)
            slots = (table[i].long()[position // size] * size + position % size).to(device)
            key, value = tokens[:, first:last]
            if first == last:
                continue
            if table is a_table:
                reference.archive(pages, key, value, slots, codec)
            else:
                reference.store(recent, key, value, slots)
    qkv = torch.randn(batch, heads + 2 * kv_heads, dim, device=device).to(dtype)
    lengths = [0 if r is None else s + r + 1 for s, r in zip(starts, recents, strict=True)]
    ints = [torch.tensor(x, dtype=torch.int32, device=device) for x in (starts, lengths)]
    longest = max(*lengths, 1)
    workspace = make_workspace(batch, heads, kv_heads, dim, longest, torch.device(device), tuning)
    for x in (workspace.sums, workspace.maxima, workspace.weights, workspace.rotated):
        x.fill_(float("nan"))
    for x in (workspace.chunks, workspace.spans):
        x.fill_(1 << 30)
    out = torch.full((batch, heads, dim), float("nan"), dtype=dtype, device=device)
    tables = (r_table.to(device), a_table.to(device))
    args = (*qkv.split([heads, kv_heads, kv_heads], 1), recent, pages, *tables, ints[1])
    case = Case(args, ints[0], codec, dim**-0.5, cap, out, workspace)
    case.plan()
    return case


def expected(case: Case) -> torch.Tensor:
    """(batch, heads, head_dim) float32 by ops.reference, one sequence at a time."""
    query, key, value, recent, pages, r_table, a_table, lengths = case.args
    kv_heads, result = key.shape[1], []
    raw_block, block = recent.shape[2], case.codec.layout.block_size
    group = query.shape[1] // kv_heads
    for i, (start, length) in enumerate(zip(case.starts.tolist(), lengths.tolist(), strict=True)):
        if not length:
            result.append(torch.zeros_like(query[i], dtype=torch.float32))
            continue
        q = query[i].float().view(1, kv_heads, group, -1)
        new = (x[i].float()[None, :, None] for x in (key, value))
        part = reference.attend_new(q, *new, group, case.scale, case.cap)
        if start:
            table = a_table[i : i + 1, : -(-start // block)].long()
            count = torch.tensor([start], device=query.device)
            other = reference.attend_archive(
                q, pages, table, count, case.codec, case.scale, case.cap
            )
            part = merge(part, other)
        if length - 1 > start:
            rows = slice(start // raw_block, -(-(length - 1) // raw_block))
            table = r_table[i : i + 1, rows].long()
            window = torch.tensor([[start % raw_block], [length - 1 - start]], device=query.device)
            other = reference.attend_recent(q, recent, table, *window, case.scale, case.cap)
            part = merge(part, other)
        result.append(part.out.flatten(0, 2))
    return torch.stack(result)


def error(case: Case) -> float:
    """Largest relative RMS error over sequences; NaN or a write that is missing gives NaN."""
    wanted, got = expected(case), case.run().float()
    difference = (got - wanted).square().mean((1, 2)).sqrt()
    return float((difference / wanted.square().mean((1, 2)).sqrt().clamp_min(1e-6)).max())


# bfloat16 rounds the output (2^-9 at most, 1.1e-3 relative RMS) and the weights times V's
# scale (the same, independent per token); fp16 output rounds eight times finer.
LIMIT = 4e-3

STARTS, RECENTS = [0, 0, 160, 480, 1200, 0, 4000], [0, 63, 0, 17, 1000, None, 16]


def check(only: str = "") -> None:
    worst: dict[str, float] = {}
    for name in [only] if only else FORMATS:
        for dim in (64, 96, 128, 256):
            for dtype in (torch.bfloat16, torch.float16):
                for group in (1, 3, 7, 8, 16) if dim == 128 else (7,):
                    for cap in (None, 5.0) if group == 7 else (None,):
                        case = make_case(name, dim, group, STARTS, RECENTS, dtype, cap=cap)
                        case.run()
                        e = error(case)
                        key = f"{name} {str(dtype)[6:]}"
                        worst[key] = max(worst.get(key, 0), e) if e == e else e
                        if not e < LIMIT:
                            print("FAIL", name, dim, dtype, group, cap, e)
        case = make_case(name, 128, 7, [131040], [31], torch.bfloat16, kv_heads=4)
        worst[f"{name} 131072 tokens"] = error(case)
    for key, value in worst.items():
        print(f"{key:28s} {value:.2e}")


def timing_cases(name, batch, length, recent, tuning=None, dim=128, heads=28, kv_heads=4):
    """Copies of one shape that together exceed L2 four times; random codes, scales near 1/64."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    block = {"k8v4": 104, "k8v8": 88, "v-mixed": 80}.get(name, 64)
    codec = make_codec(name, dim, kv_heads, block, dtype, k_basis=False)
    layout, start = codec.layout, length - 1 - recent
    size = batch * kv_heads * (start * layout.content_bytes + recent * 4 * dim)
    cases = []
    workspace = make_workspace(batch, heads, kv_heads, dim, length, torch.device(DEVICE), tuning)
    for _ in range(max(1, int(4 * L2_BYTES // size) + 1)):
        rows = -(-start // block)
        padded = -(-layout.head_bytes // 2048) * 2048
        pages = torch.randint(0, 256, (batch * rows + 1, kv_heads, padded), dtype=torch.uint8,
                              device=DEVICE)[:, :, : layout.head_bytes]  # fmt: skip
        for region in (layout.k_scales, layout.v_scales):
            layout.scales(pages, region).uniform_(0.01, 0.02)
        for codes in (*layout.codes(pages, "k"), *layout.codes(pages, "v")):
            if codes.dtype == torch.int16:
                codes.view(dtype).normal_()
        a_table = (torch.randperm(batch * rows, device=DEVICE) + 1).int().view(batch, rows)
        raw = -(-max(recent, 1) // 32) + 1
        pool = torch.randn(batch * raw + 1, kv_heads, 32, 2 * dim, dtype=dtype, device=DEVICE)
        ids = (torch.randperm(batch * raw, device=DEVICE) + 1).int().view(batch, raw)
        r_table = torch.zeros(batch, -(-length // 32) + 1, dtype=torch.int32, device=DEVICE)
        r_table[:, start // 32 : start // 32 + raw] = ids[:, : r_table.shape[1] - start // 32]
        qkv = torch.randn(batch, heads + 2 * kv_heads, dim, device=DEVICE, dtype=dtype)
        ints = [torch.full((batch,), x, dtype=torch.int32, device=DEVICE) for x in (start, length)]
        out = torch.empty(batch, heads, dim, dtype=dtype, device=DEVICE)
        args = (*qkv.split([heads, kv_heads, kv_heads], 1), pool, pages, r_table, a_table, ints[1])
        cases.append(Case(args, ints[0], codec, dim**-0.5, None, out, workspace))
        cases[-1].plan()  # the same for all copies
    return cases, size


def median_us(calls) -> float:
    """Median time of one call, from graph replays that run through all of `calls`."""
    calls = calls * max(1, 8 // len(calls))
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / len(calls))
    return sorted(times)[len(times) // 2]


def read_gbs() -> float:
    """Bandwidth of summing a large tensor."""
    x = torch.randn(1 << 29, device=DEVICE)
    return x.numel() * 4 / median_us([lambda: x.sum()]) / 1e3


def show(name, batch, length, recent, tuning=None) -> float:
    cases, size = timing_cases(name, batch, length, recent, tuning)
    us = median_us([case.run for case in cases])
    print(f"{name:12s} {batch:3d} x {length:6d} recent {recent:4d}: {us:7.1f} us "
          f"{size / us / 1e3:6.0f} GB/s  {tuning or ''}", flush=True)  # fmt: skip
    return us


SWEEP = [
    Tuning(32, 16, warps=1, stages=3, programs=12, registers=128),
    Tuning(32, 16, warps=1, stages=3, programs=16, registers=128),
    Tuning(32, 16, warps=1, stages=5, programs=8, registers=128),
    Tuning(32, 16, warps=1, stages=5, programs=12, registers=128),
    Tuning(64, 16, warps=1, stages=3, programs=8, registers=None),
    Tuning(64, 16, warps=2, stages=3, programs=8, registers=128),
    Tuning(32, 16, warps=1, stages=3, programs=8, registers=128),
]


def sweep(only: str = "") -> None:
    """Of one format, or of one tuning of it ("k8v4,3"): that fills Triton's cache."""
    wanted, _, index = only.partition(",")
    for name in [wanted] if wanted else ("k8v4", "k8v8"):
        for tuning in [SWEEP[int(index)]] if index else SWEEP:
            try:
                show(name, 64, 4097, 0, tuning)
            except Exception as failure:
                print(name, tuning, "failed:", str(failure)[:200], flush=True)


def interpret(cases: str) -> None:
    """Errors of cases given as JSON, on the CPU under TRITON_INTERPRET=1; one line of JSON."""
    torch.set_num_threads(1)
    result = {}
    for key, (name, dim, group, dtype, cap, starts, recents) in json.loads(cases).items():
        case = make_case(name, dim, group, starts, recents, getattr(torch, dtype), cap=cap,
                         block=48, device="cpu")  # fmt: skip
        result[key] = error(case)
    print(json.dumps(result))


def compile_for(what: str) -> None:
    """Compile both kernels for a GPU that need not be there: "FORMAT,CAPABILITY"."""
    name, capability = what.split(",")
    target = GPUTarget("cuda", int(capability), 32)
    layout = make_codec(name, 128, 1, 80, torch.bfloat16, "cpu").layout
    overlap = int(capability) >= LEAST_CAPABILITY
    for kernel, constants, options in launches(layout, 128, 32, 7, 64, overlap=overlap):
        signature, attributes = {}, {}
        for i, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
                continue
            signature[argument] = SIGNATURE.get(argument, "i32")
            if signature[argument][0] == "*" or "_stride" in argument:
                attributes[(i,)] = [["tt.divisibility", 16]]
        at = {(kernel.arg_names.index(k),): v for k, v in constants.items()}
        source = ASTSource(kernel, signature, at, attributes)
        compiled = triton.compile(source, target=target, options=options)
        print(kernel.__name__, capability, compiled.metadata.shared, "bytes of shared memory")


SIGNATURE = {
    **dict.fromkeys(("query", "rotated", "key", "value", "out"), "*bf16"),
    **dict.fromkeys(("recent", "pages"), "*u8"),
    **dict.fromkeys(("recent_table", "archive_table", "lengths", "chunks", "spans"), "*i32"),
    **dict.fromkeys(("sums_ptr", "maxima_ptr", "weights_ptr", "basis"), "*fp32"),
    **dict.fromkeys(("score_scale", "soft_cap"), "fp32"),
}


def profile(only: str = "") -> None:
    """Times of the single kernels, by torch's profiler."""
    for name, batch, length in (("k8v4", 64, 4097), ("k8v8", 64, 4097), ("k8v4", 1, 131073)):
        cases, _ = timing_cases(name, batch, length, 0)
        cases[0].run()
        with torch.profiler.profile() as prof:
            for case in cases * 4:
                case.run()
            torch.cuda.synchronize()
        for event in prof.key_averages():
            if event.device_time_total:
                print(f"{name} {batch} {event.key[:30]:30s} {event.device_time:8.1f} us")


def one(only: str = "") -> None:
    """One call, for ncu."""
    cases, _ = timing_cases(only, 64, 4097, 0)
    for _ in range(2):
        cases[0].run()
    torch.cuda.synchronize()


def time_all(only: str = "") -> None:
    print(f"pure read {read_gbs():.0f} GB/s")
    for name in [only] if only else ("k8v4", "k8v8", "v-mixed", "raw"):
        for batch, length in ((64, 4097), (16, 16385), (8, 32769), (1, 32769), (1, 131073)):
            show(name, batch, length, 0)
    for batch, length in ((64, 4097), (16, 16385), (64, 513)):
        show("k8v4", batch, length, 256)


if __name__ == "__main__":
    for step in sys.argv[1:] or ["check", "time"]:
        began = time.time()
        verb, _, only = step.partition(":")
        {
            "check": check,
            "sweep": sweep,
            "time": time_all,
            "profile": profile,
            "one": one,
            "interpret": interpret,
            "compile": compile_for,
        }[verb](only)
        print(f"-- {verb}: {time.time() - began:.0f} s", flush=True)
