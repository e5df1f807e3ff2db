"""Store, archive and gather on a GPU: correctness over all shapes, then times.

    python tests/gpu/check_store.py            # both; the table of times comes last
    python tests/gpu/check_store.py --no-times

Needs torch and triton only. Every case is compared with kernels.reference on the same
device. Times are CUDA graphs' (no launch overhead in them) for the heads of Qwen2.5-7B
(4 KV heads, head_dim 128); GB/s count the bytes that must be read and written once.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "kernels")]

from kernel_cases import (  # noqa: E402
    FORMATS,
    assert_same_codes,
    make_codec,
    make_table,
    random_tokens,
    strided_cache,
)

from vllm_kvpca.codec.policy import Policy  # noqa: E402
from vllm_kvpca.kernels import reference  # noqa: E402
from vllm_kvpca.kernels.archive import archive as archive_listed  # noqa: E402
from vllm_kvpca.kernels.archive import archive_decode  # noqa: E402
from vllm_kvpca.kernels.gather import gather as gather_archived  # noqa: E402
from vllm_kvpca.kernels.gather import gather_recent  # noqa: E402
from vllm_kvpca.kernels.layer_codec import LayerCodec  # noqa: E402
from vllm_kvpca.kernels.store import store as store_raw  # noqa: E402

DEVICE = "cuda"
RAW_BLOCK, BLOCK = 32, 80
COUNTS = (1, 16, 17, 63, 1000)
DTYPES = (torch.bfloat16, torch.float16)
HEADS = ((3, 64), (1, 96), (4, 128), (2, 256))


@dataclass
class Caches:
    """Filled recent pages, archive pages for kernel and reference, and new tokens."""

    recent: torch.Tensor
    pages: torch.Tensor
    wanted: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor


def caches(
    codec: LayerCodec, heads: int, raw_blocks: int, blocks: int, new: int, dtype: torch.dtype
) -> Caches:
    head_dim = codec.layout.head_dim
    recent = strided_cache(raw_blocks, heads, RAW_BLOCK, 2 * head_dim, dtype=dtype, device=DEVICE)
    key, value = random_tokens(raw_blocks * RAW_BLOCK, heads, head_dim, dtype, DEVICE)
    reference.store(recent, key, value, torch.arange(len(key), device=DEVICE))
    pages, wanted = (
        strided_cache(
            blocks, heads, codec.layout.head_bytes, dtype=torch.uint8, device=DEVICE, fill=0x77
        )
        for _ in range(2)
    )
    return Caches(recent, pages, wanted, *random_tokens(new, heads, head_dim, dtype, DEVICE))


def random_slots(count: int, blocks: int, size: int, hole: int) -> torch.Tensor:
    """Different slots outside block 0; every `hole`-th is -1."""
    slots = torch.randperm((blocks - 1) * size)[:count] + size
    slots[1::hole] = -1
    return slots.to(DEVICE)


def check_store(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    key, value = random_tokens(tokens, heads, head_dim, dtype, DEVICE)
    blocks = tokens // RAW_BLOCK + 3
    slots = random_slots(tokens, blocks, RAW_BLOCK, 5)
    shape = (blocks, heads, RAW_BLOCK, 2 * head_dim)
    actual, wanted = (strided_cache(*shape, dtype=dtype, device=DEVICE, fill=7) for _ in range(2))
    store_raw(actual, key, value, slots)
    reference.store(wanted, key, value, slots)
    assert torch.equal(actual, wanted)


def check_archive(name: str, count: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    codec = make_codec(name, head_dim, heads, dtype, DEVICE, BLOCK)
    new = count // 3
    old = count - new
    blocks = count // BLOCK + 3
    c = caches(codec, heads, old // RAW_BLOCK + 2, blocks, new + 3, dtype)
    recent_slots = torch.randperm(len(c.recent) * RAW_BLOCK)[:old].to(DEVICE)
    new_tokens = torch.randperm(new + 3)[:new].to(DEVICE)
    slots = random_slots(count, blocks, BLOCK, 7)
    args = (c.recent, c.key, c.value, recent_slots, new_tokens, slots, codec)
    archive_listed(c.pages, *args)
    reference.archive_work(c.wanted, *args)
    assert_same_codes(c.pages, c.wanted, codec)


def check_archive_decode(name: str, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Padding, no work, one step, the first crossing; captured in a graph, replayed twice."""
    policy = Policy(500, 0, 160)
    lengths = [0, 1, 500, 501, 640, 641, 2000, 960]
    starts = [0, 0, 0, 0, 480, 640, 0, 800]
    codec = make_codec(name, head_dim, heads, dtype, DEVICE, BLOCK)
    tables = (
        make_table([-(-n // RAW_BLOCK) for n in lengths], DEVICE),
        make_table([-(-n // BLOCK) for n in lengths], DEVICE),
    )
    raw_blocks, blocks = (int(table.max()) + 1 for table in tables)
    c = caches(codec, heads, raw_blocks, blocks, len(lengths), dtype)
    n = torch.zeros(len(lengths), dtype=torch.int32, device=DEVICE)
    first = torch.zeros_like(n)
    args = (c.recent, c.key, c.value, *tables, n, first, policy, codec)
    archive_decode(c.pages, *args)  # all rows are padding: compiles, writes nothing
    torch.cuda.synchronize()
    assert (c.pages == 0x77).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        archive_decode(c.pages, *args)
    for _ in range(2):
        n.copy_(torch.tensor(lengths))
        first.copy_(torch.tensor(starts))
        graph.replay()
        reference.archive_decode(c.wanted, *args)
        assert_same_codes(c.pages, c.wanted, codec)
        lengths.reverse(), starts.reverse(), [table.copy_(table.flip(0)) for table in tables]


def check_gather(name: str, count: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    codec = make_codec(name, head_dim, heads, dtype, DEVICE, BLOCK)
    begins = torch.tensor([0, 5, 40, 30], dtype=torch.int32, device=DEVICE)
    counts = torch.tensor([count, 0, 17, count // 2], dtype=torch.int32, device=DEVICE)
    ends = begins + counts
    offsets = torch.cat([counts[:1] * 0, counts.cumsum(0)]).int() + 2
    total = int(counts.sum())
    archive_table, recent_table = (
        make_table([-(-n // size) for n in ends.tolist()], DEVICE) for size in (BLOCK, RAW_BLOCK)
    )
    raw_blocks, blocks = int(recent_table.max()) + 1, int(archive_table.max()) + 1
    c = caches(codec, heads, raw_blocks, blocks, blocks * BLOCK, dtype)
    reference.archive(c.pages, c.key, c.value, torch.arange(len(c.key), device=DEVICE), codec)
    where = (begins, ends, offsets, count // 2)
    for run, expected, source, tail in (
        (gather_archived, reference.gather, (c.pages, archive_table), (codec,)),
        (gather_recent, reference.gather_recent, (c.recent, recent_table), ()),
    ):
        outs = [
            torch.full((total + 4, heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
            for _ in range(4)
        ]
        run(*source, *where, *outs[:2], *tail)
        expected(*source, *where, *outs[2:], *tail)
        # One float32 product, rounded once: equal bit for bit.
        torch.testing.assert_close(outs[:2], outs[2:], rtol=0, atol=0, equal_nan=True)


def check_all() -> int:
    """Every case; returns the number of failures."""
    cases: list[tuple[Callable[..., None], tuple[object, ...]]] = []
    for (heads, dim), dtype in itertools.product(HEADS, DTYPES):
        cases += [(check_store, (n, heads, dim, dtype)) for n in COUNTS]
        for name in FORMATS:
            cases += [(check_archive, (name, n, heads, dim, dtype)) for n in (1, 17, 1000)]
            cases.append((check_archive_decode, (name, heads, dim, dtype)))
            cases += [(check_gather, (name, n, heads, dim, dtype)) for n in (1, 63, 1000)]
    failed = 0
    for number, (check, args) in enumerate(cases):
        torch.manual_seed(number)
        try:
            check(*args)
        except Exception as error:
            failed += 1
            print("FAIL", check.__name__, *args, "|", str(error).strip()[:300])
    print(f"{len(cases) - failed} of {len(cases)} cases passed")
    return failed


def report(name: str, run: Callable[[], None], moved: int) -> str:
    run()
    microseconds = 1000 * triton.testing.do_bench_cudagraph(run)
    return f"{name:44} {microseconds:9.1f} {moved / microseconds / 1e3:9.0f}"


def times(heads: int = 4, head_dim: int = 128) -> list[str]:
    """Rows of the table: what, microseconds, GB/s."""
    rows = []
    dtype = torch.bfloat16
    raw = 4 * head_dim * heads  # bytes of one token's K and V
    for name in ("k8v8", "k8v4", "kv-mixed"):
        codec = make_codec(name, head_dim, heads, dtype, DEVICE, BLOCK)
        packed = codec.layout.content_bytes * heads
        for tokens in (64, 8192):
            blocks, raw_blocks = -(-tokens // BLOCK) + 1, -(-tokens // RAW_BLOCK) + 1
            c = caches(codec, heads, raw_blocks, blocks, tokens, dtype)
            index = torch.arange(tokens, device=DEVICE)
            none = index[:0]
            if name == "k8v8":
                slots = index + RAW_BLOCK
                run = lambda: store_raw(c.recent, c.key, c.value, slots)
                rows.append(report(f"store, {tokens} tokens", run, 2 * raw * tokens))
            slots_c = index + BLOCK
            for source, old, new in (("recent", index, none), ("new", none, index)):
                run = lambda: archive_listed(
                    c.pages,
                    c.recent,
                    c.key,
                    c.value,
                    old,
                    new,
                    slots_c,
                    codec,
                )
                label = f"archive {name}, {tokens} {source} tokens"
                rows.append(report(label, run, (raw + packed) * tokens))
        rows += decode_times(name, codec, heads, head_dim)
        rows += gather_times(name, codec, heads, head_dim, raw, packed)
    return rows


def decode_times(name: str, codec: LayerCodec, heads: int, head_dim: int) -> list[str]:
    """A batch of 64 where nothing leaves the window, where one sequence, and where all do."""
    batch, length, align = 64, 1120, 160
    policy = Policy(512, 160, align)
    tables = (
        make_table([length // RAW_BLOCK] * batch, DEVICE),
        make_table([length // BLOCK] * batch, DEVICE),
    )
    raw_blocks, blocks = (int(table.max()) + 1 for table in tables)
    c = caches(codec, heads, raw_blocks, blocks, batch, torch.bfloat16)
    lengths = torch.full((batch,), length, dtype=torch.int32, device=DEVICE)
    token = (4 * head_dim + codec.layout.content_bytes) * heads
    rows = []
    for busy in (0, 1, batch):
        starts = torch.full_like(lengths, policy.boundary(length))
        starts[:busy] -= align
        run = lambda: archive_decode(
            c.pages,
            c.recent,
            c.key,
            c.value,
            *tables,
            lengths,
            starts,
            policy,
            codec,
        )
        label = f"archive_decode {name}, {busy} of {batch} sequences"
        rows.append(report(label, run, busy * align * token))
    return rows


def gather_times(
    name: str, codec: LayerCodec, heads: int, head_dim: int, raw: int, packed: int
) -> list[str]:
    """Eight sequences of 4,000 tokens."""
    batch, count = 8, 4000
    tables = (
        make_table([-(-count // BLOCK)] * batch, DEVICE),
        make_table([-(-count // RAW_BLOCK)] * batch, DEVICE),
    )
    blocks, raw_blocks = (int(table.max()) + 1 for table in tables)
    c = caches(codec, heads, raw_blocks, blocks, 1, torch.bfloat16)
    begins = torch.zeros(batch, dtype=torch.int32, device=DEVICE)
    ends = begins + count
    offsets = torch.arange(batch, dtype=torch.int32, device=DEVICE) * count
    out_k, out_v = torch.empty(
        2, batch * count, heads, head_dim, dtype=torch.bfloat16, device=DEVICE
    )
    where = (begins, ends, offsets, count, out_k, out_v)
    run = lambda: gather_archived(c.pages, tables[0], *where, codec)
    rows = [report(f"gather {name}, 8 x 4000 tokens", run, (raw + packed) * batch * count)]
    if name == "k8v8":
        run = lambda: gather_recent(c.recent, tables[1], *where)
        rows.append(report("gather_recent, 8 x 4000 tokens", run, 2 * raw * batch * count))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-times", action="store_true")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton", triton.__version__)
    failed = check_all()
    if not options.no_times:
        rows = times()
        print(f"{'kernel':44} {'us':>9} {'GB/s':>9}")
        print("\n".join(rows))
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
