"""The archive kernel against its torch reference."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import (
    FORMATS,
    assert_same_codes,
    filled_recent,
    make_codec,
    make_plan,
    make_table,
    plan_step,
    random_tokens,
    step_tensors,
    strided_cache,
)

from vllm_kvpca.ops.archive import reference
from vllm_kvpca.ops.expand import reference as expand_reference
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.step_plan import PrefillGroup, StepPlan, StepTokens

kernel = pytest.importorskip("vllm_kvpca.ops.archive.kernel", exc_type=ImportError)
expand = pytest.importorskip("vllm_kvpca.ops.expand.kernel", exc_type=ImportError)

RAW_BLOCK = 32
BLOCK = 48
EVERYTHING = Policy(0, 0, 1)
"""Every token is archived at once."""
POLICY = Policy(300, 40, 96)
"""301 tokens archive 192 at once."""


def empty_pages(blocks, heads, codec, device):
    """0x77 everywhere: a byte nobody wrote shows, in both pages alike."""
    rest = codec.layout.head_bytes
    return [
        strided_cache(blocks, heads, rest, dtype=torch.uint8, device=device, fill=0x77)
        for _ in range(2)
    ]


@dataclass
class Case:
    """A step, its tokens, and pages for the reference (`wanted`) and for the kernel (`actual`)."""

    codec: LayerCodec
    step: StepPlan
    tokens: StepTokens
    recent: torch.Tensor
    wanted: torch.Tensor
    actual: torch.Tensor

    def archive(self) -> None:
        """By the kernel."""
        cache = LayerCache(self.recent, self.actual, self.codec)
        kernel.archive(self.step, self.tokens, cache)

    def both(self) -> None:
        """By the kernel and by the reference, which write the same."""
        self.archive()
        reference.archive(self.step, self.tokens, LayerCache(self.recent, self.wanted, self.codec))
        assert_same_codes(self.actual, self.wanted, self.codec)


def longest(new: int) -> tuple[PrefillGroup, ...]:
    """What makes `new` a step's most new tokens of a sequence; nothing else of it is read."""
    none = torch.zeros(0)
    return (PrefillGroup(slice(0), slice(0), new, new, False, none, none),)


def make_case(name, dtype, policy, sequences, heads, head_dim, device, max_new=1) -> Case:
    torch.manual_seed(7)
    codec = make_codec(name, head_dim, heads, dtype, device, BLOCK)
    where = step_tensors(sequences, device)
    n = where[1].tolist()
    recent_table = make_table([-(-x // RAW_BLOCK) for x in n], device)
    archive_table = make_table([-(-policy.boundary(x) // BLOCK) for x in n], device)
    blocks = int(recent_table.max()) + 1
    recent = filled_recent(blocks, heads, RAW_BLOCK, head_dim, dtype, device)
    key, value = random_tokens(max(1, int(where[0][-1])), heads, head_dim, dtype, device)
    wanted, actual = empty_pages(int(archive_table.max()) + 2, heads, codec, device)
    plan = make_plan(codec, RAW_BLOCK, policy)
    step = plan_step(plan, where, recent_table, archive_table, prefills=longest(max_new))
    return Case(codec, step, StepTokens(key, key, value, key), recent, wanted, actual)


def check(name, dtype, policy, sequences, heads, head_dim, device, max_new=None):
    """Kernel and reference write the same; returns the kernel's pages."""
    if max_new is None:
        max_new = max(new for _, new, _ in sequences)
    case = make_case(name, dtype, policy, sequences, heads, head_dim, device, max(1, max_new))
    case.both()
    assert (case.actual[0] == 0x77).all(), "the null block was written"
    assert (case.wanted[1:] != 0x77).any()


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads, head_dim", [(3, 64), (1, 96), (2, 128), (1, 256)])
def test_codes_of_every_format(name, dtype, heads, head_dim, device):
    """17 old and 16 new tokens in one tile and a bit."""
    check(name, dtype, EVERYTHING, [(20, 16, 3)], heads, head_dim, device)


@pytest.mark.parametrize("name", ["k8v4", "kv-mixed"])
@pytest.mark.parametrize("old, new", [(1, 0), (0, 1), (16, 0), (0, 17), (63, 1), (337, 63)])
def test_any_number_of_tokens_from_both_sources(name, old, new, device):
    heads = 1 if old > 63 else 4  # the interpreter takes its time
    check(name, torch.bfloat16, EVERYTHING, [(old, new, 0)], heads, 64, device)


DECODES = [
    (0, 0, 0),  # a padding row
    (0, 1, 0),  # the first token
    (299, 1, 0),  # one short of the threshold
    (300, 1, 0),  # crosses it: 192 tokens
    (301, 1, 192),  # nothing to do
    (327, 1, 192),  # one step: [192, 288)
    (499, 1, 0),  # 384 tokens: more than the grid has tiles
    (328, 1, 300),  # a prefix hit archived more than the boundary
    (0, 0, 0),
]
PREFILLS = [
    (0, 340, 0),  # a prompt: [0, 288), all of it new
    (0, 300, 0),  # one that stays raw
    (250, 200, 0),  # the crossing, from both sources
    (310, 3, 192),  # nothing to do
    (400, 90, 400),  # a prefix hit archived more than the boundary: [400, 384) is empty
    (400, 140, 400),  # and here [400, 480), all of it new
]


@pytest.mark.parametrize(
    "name, dtype", [("raw", torch.bfloat16), ("k8v4", torch.float16), ("kv-mixed", torch.bfloat16)]
)
@pytest.mark.parametrize("sequences", [DECODES, DECODES[4:7] + PREFILLS], ids=["decode", "mixed"])
def test_a_step_archives_what_leaves_the_window(name, dtype, sequences, device):
    check(name, dtype, POLICY, sequences, 1, 64, device)


@pytest.mark.parametrize("max_new", [1, 40, 4000])
def test_the_grid_does_not_limit_the_work(max_new, device):
    check("k8v4", torch.float16, EVERYTHING, [(0, 300, 0), (250, 1, 2)], 1, 64, device, max_new)


@pytest.mark.parametrize("table", ["recent", "archive"])
def test_tokens_of_the_null_block_are_passed_over(table, device):
    """Sources in the null block are NaN here, and targets would show in page 0."""
    sequences = [(96, 30, 0), (40, 1, 0)]
    case = make_case("k8v4", torch.bfloat16, EVERYTHING, sequences, 1, 64, device, 30)
    rows = case.step.recent_table if table == "recent" else case.step.archive_table
    rows[:, 1] = 0
    case.both()
    assert (case.actual[0] == 0x77).all()
    scales = case.codec.layout.scales(case.actual, case.codec.layout.k_scales)
    assert scales.isfinite().all()
    skipped = 32 + 8 if table == "recent" else 48
    assert int((scales.view(torch.int16) != 0x7777).sum()) == 126 + 41 - skipped


def test_the_last_archived_token_may_be_the_new_one(device):
    """keep_recent 0: the token at length - 1 comes from K and V, not from a recent page."""
    policy = Policy(48, 0, 48)
    sequences = [(47, 1, 0), (95, 1, 48), (143, 1, 96), (48, 1, 0)]
    case = make_case("k8v8", torch.bfloat16, policy, sequences, 1, 64, device)
    for i, (computed, _, _) in enumerate(sequences):
        # Where the new token will be stored: must not be read.
        block = case.step.recent_table[i, computed // RAW_BLOCK]
        case.recent[block, :, computed % RAW_BLOCK] = float("nan")
    case.both()
    scales = case.codec.layout.scales(case.actual, case.codec.layout.k_scales)[:, 0]
    assert int((scales.view(torch.int16) != 0x7777).sum()) == 48 + 48 + 48  # 48 tokens stay raw
    assert scales.isfinite().all()


def test_a_step_in_which_nothing_leaves(device):
    sequences = [(0, 0, 0), (298, 1, 0), (302, 1, 192)]
    case = make_case("k8v4", torch.bfloat16, POLICY, sequences, 1, 64, device)
    case.archive()
    assert (case.actual == 0x77).all()


def archive_key(codec, key, device):
    """`key`, as K and V of a sequence's first tokens, archived by both."""
    table = torch.ones(1, 1, dtype=torch.int32, device=device)
    plan = make_plan(codec, RAW_BLOCK, EVERYTHING)
    step = plan_step(plan, step_tensors([(0, len(key), 0)], device), table, table)
    recent = torch.zeros(1, 1, RAW_BLOCK, 128, device=device).to(key.dtype)
    pages = empty_pages(2, 1, codec, device)
    case = Case(codec, step, StepTokens(key, key, key, key), recent, *pages)
    case.both()
    assert torch.equal(case.actual, case.wanted)
    return case.actual


@pytest.mark.parametrize("name", list(FORMATS))
def test_zero_vectors_have_scale_zero(name, device):
    codec = make_codec(name, 64, 1, torch.float16, device, BLOCK)
    pages = archive_key(codec, torch.zeros(3, 1, 64, device=device).half(), device)
    if name != "raw":
        scales = codec.layout.scales(pages, codec.layout.v_scales)
        assert (scales[1, 0, :3] == 0).all()


def test_ties_round_to_even(device):
    """Halves in every code: scale 1 (absmax 127) makes components of k + 1/2 exact ties."""
    codec = make_codec("k8v8", 64, 1, torch.float16, device, BLOCK)
    key = (torch.arange(64).float() - 32.5)[None, None].to(device).half()
    key[..., 0] = 127
    pages = archive_key(codec, key, device)
    (codes,) = codec.layout.codes(pages, "k")
    assert codes[1, 0, 0, 0].view(torch.int8)[1:5].tolist() == [-32, -30, -30, -28]


def test_no_sequences(device):
    case = make_case("raw", torch.float16, POLICY, [(0, 1, 0)], 1, 64, device)
    step = case.step
    none = {
        name: getattr(step, name)[:0]
        for name in ("lengths", "starts", "recent_table", "archive_table")
    }
    case.step = replace(step, query_start=step.query_start[:1], **none, _shared={})
    case.archive()
    assert (case.actual == 0x77).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["k8v8", "plain-mixed"])
def test_codes_at_the_end_of_the_dtype(name, dtype, device):
    """Bit for bit where scales round up past it, and for the smallest values.

    Subnormal ones in float16 alone: of bfloat16 the interpreter drops them.
    """
    codec = make_codec(name, 64, 1, dtype, device, BLOCK)
    least, end = (0x80, 0x7F80) if dtype == torch.bfloat16 else (0, 0x7C00)
    patterns = torch.arange(least, end, dtype=torch.int16)
    key = torch.cat([patterns[:512], patterns[-1536:]]).view(dtype).view(32, 1, 64).to(device)
    for sign in (1, -1):
        archive_key(codec, sign * key, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", list(FORMATS))
def test_the_largest_values_come_back_finite(name, dtype, device):
    """Through pages, both kernels and both references, whatever the basis."""
    codec = make_codec(name, 64, 1, dtype, device, BLOCK)
    most = torch.finfo(dtype).max
    signs = torch.randint(0, 2, (32, 1, 64), generator=torch.Generator().manual_seed(1)) * 2 - 1
    key = (signs * most).to(dtype).to(device)
    key[0] = most
    table = torch.ones(1, 1, dtype=torch.int32, device=device)
    plan = make_plan(codec, RAW_BLOCK, EVERYTHING)
    recent = torch.zeros(2, 1, RAW_BLOCK, 128, device=device, dtype=dtype)
    pages = empty_pages(2, 1, codec, device)
    step = plan_step(plan, step_tensors([(0, 32, 0)], device), table, table)
    case = Case(codec, step, StepTokens(key, key, key, key), recent, *pages)
    case.both()
    step = plan_step(plan, step_tensors([(32, 0, 32)], device), table, table)
    first = torch.zeros(2, dtype=torch.int32, device=device)
    group = PrefillGroup(slice(0, 1), slice(0), 1, 32, True, first, first)
    none = StepTokens(key[:0], key[:0], key[:0], key[:0])
    for filled, op in ((case.wanted, expand_reference), (case.actual, expand)):
        for region in (codec.layout.k_scales, codec.layout.v_scales):
            assert codec.layout.scales(filled, region)[1, 0, :32].isfinite().all()
        k, v = torch.full((2, 32, 1, 64), float("nan"), device=device, dtype=dtype)
        op.expand(step, group, none, LayerCache(recent, filled, codec), k, v)
        assert k.isfinite().all() and v.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(FORMATS))
def test_a_captured_step_serves_every_later_one(name, device):
    """Padding, no work, one step, the first crossing: captured while all is padding, replayed."""
    policy = Policy(500, 0, 160)
    starts = [0, 0, 0, 0, 480, 640, 0, 800]
    lengths = [0, 1, 500, 501, 640, 641, 2000, 960]
    sequences = [
        (max(0, n - 1), min(n, 1), start) for n, start in zip(lengths, starts, strict=True)
    ]
    case = make_case(name, torch.bfloat16, policy, sequences, 4, 128, device)
    step = case.step
    changing = (step.query_start, step.lengths, step.starts, step.busy)
    saved = [x.clone() for x in changing]
    for x in changing:
        x.zero_()
    case.archive()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.archive()
    assert (case.actual == 0x77).all()
    for x, values in zip(changing, saved, strict=True):
        x.copy_(values)
    graph.replay()
    cache = LayerCache(case.recent, case.wanted, case.codec)
    reference.archive(step, case.tokens, cache)
    assert_same_codes(case.actual, case.wanted, case.codec)
