"""Decode attention alone, on one GPU and in one run: FlashAttention-3 and TurboQuant as vLLM
ships them against our kernel in each format.

Every contender attends with one new token per sequence to a paged cache filled with random
content. Calls are captured in a CUDA graph that goes round several disjoint sets of blocks, so
that no call finds its cache in the GPU's L2; the time is the median over replays. Bytes are those
of K and V that are stored for the tokens, scales included; read bandwidth is measured beside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from statistics import median
from typing import Any

import torch

from vllm_kvpca.lab import gpu_engines, presets
from vllm_kvpca.lab.attention_contenders import ALL_ARCHIVED, PEERS, Call, Shape, build
from vllm_kvpca.lab.record import Record, make_record
from vllm_kvpca.lab.table import Table, columns, lines

REPLAYS = 20


def run(model: str, batches: Sequence[tuple[int, int]], names: Sequence[str]) -> Record:
    """A record of kind "kernels".

    Args:
        model: folder with a config.json, or Hub name.
        batches: sequences, and tokens of each.
        names: presets, or calibrated formats, which get random bases.
    """
    gpu_engines.check(names, model)
    heads = presets.attention_heads(model)
    bandwidth = read_bandwidth()
    ours = [name + part for name in names for part in ("", ALL_ARCHIVED)]
    rows: list[dict[str, Any]] = []
    for batch, context in batches:
        rows += measure(Shape(batch, context, *heads), [*PEERS, *ours])
    settings = dict(zip(("heads", "kv_heads", "head_dim"), heads, strict=True))
    return make_record("kernels", [], model, settings, compare(rows, bandwidth), seed=0)


def measure(shape: Shape, contenders: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each contender: microseconds, stored bytes per token and head, GB/s."""
    for name in contenders:
        torch.manual_seed(0)
        call, sets, token_bytes = build(shape, name)
        seconds = _time(call, sets)
        stored = shape.batch * shape.context * shape.kv_heads * token_bytes
        yield {
            "shape": shape.name,
            "contender": name,
            "token_head_bytes": token_bytes,
            "microseconds": seconds * 1e6,
            "gigabytes_per_second": stored / seconds / 1e9,
        }
        del call
        torch.cuda.empty_cache()


def read_bandwidth(size: int = 1 << 31) -> float:
    """GB/s of a kernel that does nothing but read device memory."""
    import triton
    import triton.language as tl

    @triton.jit
    def read(source, out, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
        offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + tl.program_id(0), tl.max(tl.load(source + offset), 0))

    block = 16384
    source = torch.randint(0, 100, (size // 4,), dtype=torch.int32, device="cuda")
    out = torch.empty(size // 4 // block, dtype=torch.int32, device="cuda")
    seconds = _time(lambda _: read[(len(out),)](source, out, BLOCK=block, num_warps=8), 1)
    return size / seconds / 1e9


def _time(call: Call, sets: int) -> float:
    """Seconds of one call: median over replays of a graph with one call for each set."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which still fills the caches
    with torch.cuda.stream(stream):
        for index in range(sets):  # compiles, and allocates what the calls keep
            call(index)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    rounds = max(1, 4 // sets)
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for index in range(sets):
                call(index)
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / (sets * rounds))
    return median(times[3:])


def compare(rows: Sequence[dict[str, Any]], bandwidth: float) -> dict[str, Any]:
    """The results of a record: every row with its ratio to FlashAttention-3 in bf16 and its
    share of the read bandwidth."""
    baseline = {r["shape"]: r["microseconds"] for r in rows if r["contender"] == "fa3-bf16"}
    complete = []
    for row in rows:
        speed: float | None = None
        with suppress(KeyError):
            speed = baseline[row["shape"]] / row["microseconds"]
        share = row["gigabytes_per_second"] / bandwidth
        complete.append({**row, "against_fa3_bf16": speed, "share_of_read_bandwidth": share})
    return {"read_gigabytes_per_second": bandwidth, "rows": complete}


def _heads(record: Record) -> list[str]:
    return ["kernel", *(shape.replace("x", " x ") for shape in columns(record, "shape"))]


def _rows(record: Record) -> list[list[str]]:
    """A line for each kernel; microseconds and speed against FlashAttention-3 in bf16."""

    def cell(row: dict[str, Any]) -> str:
        speed = row["against_fa3_bf16"]
        return f"{row['microseconds']:,.0f} us" + ("" if speed is None else f" ({speed:.2f}x)")

    return [[f"`{name}`", *cells] for name, *cells in lines(record, "contender", cell)]


TABLES = {"kernels": Table(_heads, _rows, "vllm-kvpca bench kernels")}
