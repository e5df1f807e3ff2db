"""Starts, store, archive and gather on a GPU: correctness over all shapes, then times.

    python tests/gpu/check_store.py            # both; the table of times comes last
    python tests/gpu/check_store.py --no-times

Needs torch and triton only. Every case is compared with ops.reference on the same
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "ops")]

from kernel_cases import (  # noqa: E402
    FORMATS,
    Sequences,
    assert_expanded,
    assert_same_codes,
    busy_list,
    filled_recent,
    make_codec,
    make_table,
    random_tokens,
    step_tensors,
    strided_cache,
)

from vllm_kvpca.ops import reference  # noqa: E402
from vllm_kvpca.ops.archive.kernel import archive  # noqa: E402
from vllm_kvpca.ops.expand.kernel import gather  # noqa: E402
from vllm_kvpca.ops.layer_codec import LayerCodec  # noqa: E402
from vllm_kvpca.ops.starts.kernel import list_busy  # noqa: E402
from vllm_kvpca.ops.starts.kernel import starts as find_starts  # noqa: E402
from vllm_kvpca.ops.store.kernel import store as store_raw  # noqa: E402
from vllm_kvpca.pages.boundary import Policy  # noqa: E402

DEVICE = "cuda"
RAW_BLOCK, BLOCK = 32, 80
COUNTS = (1, 16, 17, 63, 1000)
EVERYTHING = Policy(0, 0, 1)
"""Every token is archived at once."""
DTYPES = (torch.bfloat16, torch.float16)
HEADS = ((3, 64), (1, 96), (4, 128), (2, 256))


@dataclass
class Step:
    """Filled caches and the tensors of one step; `wanted` are the reference's pages."""

    recent: torch.Tensor
    pages: torch.Tensor
    wanted: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    where: tuple[torch.Tensor, ...]
    """query_start, lengths, starts, recent_table, archive_table."""

    @property
    def sources(self) -> tuple[torch.Tensor, ...]:
        return self.recent, self.key, self.value


def make_step(codec: LayerCodec, heads: int, sequences: Sequences) -> Step:
    head_dim, dtype = codec.layout.head_dim, codec.dtype
    where = step_tensors(sequences, DEVICE)
    lengths = where[1].tolist()
    tables = [make_table([-(-n // size) for n in lengths], DEVICE) for size in (RAW_BLOCK, BLOCK)]
    raw_blocks, blocks = (int(table.max()) + 1 for table in tables)
    recent = filled_recent(raw_blocks, heads, RAW_BLOCK, head_dim, dtype, DEVICE)
    pages, wanted = (
        strided_cache(
            blocks, heads, codec.layout.head_bytes, dtype=torch.uint8, device=DEVICE, fill=0x77
        )
        for _ in range(2)
    )
    tokens = random_tokens(max(1, int(where[0][-1])), heads, head_dim, dtype, DEVICE)
    return Step(recent, pages, wanted, *tokens, (*where, *tables))


def check_store(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    key, value = random_tokens(tokens, heads, head_dim, dtype, DEVICE)
    blocks = tokens // RAW_BLOCK + 3
    slots = (torch.randperm((blocks - 1) * RAW_BLOCK)[:tokens] + RAW_BLOCK).to(DEVICE)
    slots[1::5] = -1
    slots[2::5] %= RAW_BLOCK  # the null block
    shape = (blocks, heads, RAW_BLOCK, 2 * head_dim)
    actual, wanted = (strided_cache(*shape, dtype=dtype, device=DEVICE, fill=7) for _ in range(2))
    store_raw(actual, key, value, slots)
    reference.store(wanted, key, value, slots)
    assert torch.equal(actual, wanted)


def check_starts(nulls: int) -> None:
    """Boundary, prefix hits and padding rows; ops.starts.kernel has the definition."""
    policy = Policy(300, 40, 96)
    sequences = [(0, 0, 0), (300, 1, 0), (301, 1, 0), (100, 9, 0), (9000, 70, 0), (0, 64, 0)]
    query_start, lengths, _ = step_tensors(sequences, DEVICE)
    table = torch.ones(len(sequences), 300, dtype=torch.int32, device=DEVICE)
    table[:, :nulls] = 0
    out = torch.full_like(lengths, -7)
    find_starts(query_start, lengths, table, RAW_BLOCK, policy, out)
    archived = -(-nulls * RAW_BLOCK // policy.align) * policy.align  # by whole archive blocks
    wanted = [min(n, max(policy.boundary(n), archived)) for n, _, _ in sequences]
    assert out.tolist() == wanted, (out.tolist(), wanted)


def busy_of(args: tuple) -> torch.Tensor:
    """The list that belongs to the arguments of an archive step."""
    *_, lengths, starts, _, _, policy, _ = args
    return busy_list(starts, lengths, policy)


def check_archive(name: str, count: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """A third of the tokens is new; a block of either table is null."""
    codec = make_codec(name, head_dim, heads, dtype, DEVICE, BLOCK)
    new = count // 3
    step = make_step(codec, heads, [(count - new, new, 0), (3 * count, 1, count), (0, 0, 0)])
    for table in step.where[3:]:
        table[1, table.shape[1] // 2] = 0
    args = (*step.sources, *step.where, EVERYTHING, codec)
    archive(step.pages, *args, busy_of(args), max_new=max(1, new))
    reference.archive_step(step.wanted, *args)
    assert_same_codes(step.pages, step.wanted, codec)
    assert (step.pages[0] == 0x77).all()


def check_archive_graph(name: str, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    """Padding, no work, one step, the first crossing; captured in a graph, replayed twice."""
    policy = Policy(500, 0, 160)
    starts = [0, 0, 0, 0, 480, 640, 0, 800]
    lengths = [0, 1, 500, 501, 640, 641, 2000, 960]
    sequences = [
        (max(0, n - 1), min(n, 1), start) for n, start in zip(lengths, starts, strict=True)
    ]
    codec = make_codec(name, head_dim, heads, dtype, DEVICE, BLOCK)
    step = make_step(codec, heads, sequences)
    query_start, n, first, *tables = step.where
    args = (*step.sources, *step.where, policy, codec)
    saved = [x.clone() for x in (query_start, n, first)]
    for x in (query_start, n, first):
        x.zero_()
    busy = torch.zeros(len(starts) + 1, dtype=torch.int32, device=DEVICE)
    archive(step.pages, *args, busy)  # all rows are padding: compiles, writes nothing
    torch.cuda.synchronize()
    assert (step.pages == 0x77).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        list_busy(first, n, policy, busy)
        archive(step.pages, *args, busy)
    for _ in range(2):
        for x, values in zip((query_start, n, first), saved, strict=True):
            x.copy_(values)
        graph.replay()
        reference.archive_step(step.wanted, *args)
        assert_same_codes(step.pages, step.wanted, codec)
        new = saved[0].diff().flip(0)
        saved = [torch.nn.functional.pad(new.cumsum(0), (1, 0)), saved[1].flip(0), saved[2].flip(0)]
        for table in tables:
            table.copy_(table.flip(0))


def check_gather(name: str, count: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
    codec = make_codec(name, head_dim, heads, dtype, DEVICE, BLOCK)
    sequences = [(2 * count, 3, count), (0, 5, 0), (count, 1, count), (40, 17, 0), (0, 0, 0)]
    step = make_step(codec, heads, sequences)
    # Every page's tokens are valid: they are archived as far as the tables go.
    query_start, lengths, starts, *tables = step.where
    everything = (query_start, lengths, torch.zeros_like(starts), *tables)
    reference.archive_step(step.pages, *step.sources, *everything, EVERYTHING, codec)
    offsets = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)) + 2
    total, longest = int(lengths.sum()), int(lengths.max())
    outs = [
        torch.full((total + 4, heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
        for _ in range(4)
    ]
    args = (step.pages, *step.sources, *step.where, offsets, longest)
    gather(*args, *outs[:2], codec)
    reference.gather(*args, *outs[2:], codec)
    for which, actual, wanted in zip("kv", outs[:2], outs[2:], strict=True):
        assert_expanded(actual, wanted, codec, which)
        assert actual[:2].isnan().all() and actual[total + 2 :].isnan().all()
        assert not actual[2 : total + 2].isnan().any()


def check_all() -> int:
    """Every case; returns the number of failures."""
    cases: list[tuple[Callable[..., None], tuple[object, ...]]] = []
    cases += [(check_starts, (nulls,)) for nulls in (0, 1, 63, 64, 65, 200)]
    for (heads, dim), dtype in itertools.product(HEADS, DTYPES):
        cases += [(check_store, (n, heads, dim, dtype)) for n in COUNTS]
        for name in FORMATS:
            cases += [(check_archive, (name, n, heads, dim, dtype)) for n in (1, 17, 1000)]
            cases.append((check_archive_graph, (name, heads, dim, dtype)))
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
    rows = store_times(heads, head_dim)
    for name in ("k8v8", "k8v4", "kv-mixed"):
        codec = make_codec(name, head_dim, heads, torch.bfloat16, DEVICE, BLOCK)
        rows += archive_times(name, codec, heads)
        rows += decode_times(name, codec, heads)
        rows += gather_times(name, codec, heads)
    return rows


def raw_bytes(codec: LayerCodec, heads: int) -> int:
    """Bytes of one token's raw K and V."""
    return 4 * codec.layout.head_dim * heads


def packed_bytes(codec: LayerCodec, heads: int) -> int:
    """Bytes of one archived token."""
    return codec.layout.content_bytes * heads


def store_times(heads: int, head_dim: int) -> list[str]:
    codec = make_codec("raw", head_dim, heads, torch.bfloat16, DEVICE, BLOCK)
    rows = []
    for tokens in (64, 8192):
        step = make_step(codec, heads, [(0, tokens, 0)])
        slots = torch.arange(tokens, device=DEVICE) + RAW_BLOCK
        run = lambda: store_raw(step.recent, step.key, step.value, slots)
        rows.append(report(f"store, {tokens} tokens", run, 2 * raw_bytes(codec, heads) * tokens))
    return rows


def archive_times(name: str, codec: LayerCodec, heads: int) -> list[str]:
    """A prompt that is archived whole, and the same tokens from recent pages."""
    rows = []
    moved = raw_bytes(codec, heads) + packed_bytes(codec, heads)
    for tokens in (64, 8192):
        for source, sequence in (("new", (0, tokens, 0)), ("recent", (tokens, 0, 0))):
            step = make_step(codec, heads, [sequence])
            args = (*step.sources, *step.where, EVERYTHING, codec)
            busy = busy_of(args)
            run = lambda: archive(step.pages, *args, busy, max_new=tokens)
            rows.append(report(f"archive {name}, {tokens} {source} tokens", run, moved * tokens))
    return rows


def decode_times(name: str, codec: LayerCodec, heads: int) -> list[str]:
    """A batch of 64 where nothing leaves the window, where one sequence, and where all do."""
    batch, length, align = 64, 1120, 160
    policy = Policy(512, 160, align)
    done = policy.boundary(length)
    moved = raw_bytes(codec, heads) + packed_bytes(codec, heads)
    rows = []
    for busy in (0, 1, batch):
        sequences = [(length - 1, 1, done - align * (i < busy)) for i in range(batch)]
        step = make_step(codec, heads, sequences)
        args = (*step.sources, *step.where, policy, codec)
        busy_rows = busy_of(args)
        run = lambda: archive(step.pages, *args, busy_rows)
        label = f"archive {name}, decode, {busy} of {batch} sequences"
        rows.append(report(label, run, busy * align * moved))
    return rows


def gather_times(name: str, codec: LayerCodec, heads: int) -> list[str]:
    """Sequences that are archived, or raw, up to their last 16 tokens."""
    rows = []
    raw, packed = raw_bytes(codec, heads), packed_bytes(codec, heads)
    for batch, count in ((8, 4000), (1, 32000)):
        for part, start, read in (("archived", count, packed), ("raw", 0, raw)):
            if part == "raw" and name != "k8v8":
                continue
            step = make_step(codec, heads, [(count, 16, start)] * batch)
            total = batch * (count + 16)
            out = torch.empty(
                2, total, heads, codec.layout.head_dim, dtype=codec.dtype, device=DEVICE
            )
            offsets = torch.arange(batch + 1, dtype=torch.int32, device=DEVICE) * (count + 16)
            args = (step.pages, *step.sources, *step.where, offsets, count + 16, *out, codec)
            run = lambda: gather(*args)
            label = f"gather {name}, {batch} x {count} {part} tokens"
            rows.append(report(label, run, (raw + read) * total))
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
