"""Formats, codecs and filled caches that the kernel tests share; torch only."""

from __future__ import annotations

import torch

from vllm_kvpca.codec.bands import QUANTIZED, Band, signed_nibbles
from vllm_kvpca.codec.key_bias import KeyBias
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.ops.store.reference import store_slots
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layer_plan import LayerPlan, Stream
from vllm_kvpca.pages.layout import ArchiveLayout
from vllm_kvpca.pages.step_plan import StepPlan

LONGEST = 1 << 18
"""Tokens of the longest sequence of any test."""
Shares = list[tuple[float, int]]
Sequences = list[tuple[int, int, int]]
"""(computed tokens, new tokens, archived tokens) of each sequence before a step."""

# (K's bands, K rotated, V's bands, V rotated); widths as shares of head_dim. "stretched" is a basis
# that is not orthonormal, "without bias" one for K whose bias is taken out.
FORMATS: dict[str, tuple[Shares, bool | str, Shares, bool]] = {
    "raw": ([(1, 16)], False, [(1, 16)], False),
    "k8v8": ([(1, 8)], False, [(1, 8)], False),
    "k8v4": ([(1, 8)], False, [(1, 4)], True),
    "v-mixed": ([(1, 16)], False, [(3 / 8, 8), (5 / 8, 4)], True),
    "v-rank-int8": ([(1, 16)], False, [(3 / 4, 8), (1 / 4, 0)], True),
    "kv-mixed": ([(1 / 4, 8), (3 / 4, 4)], True, [(3 / 8, 8), (5 / 8, 4)], True),
    "k4v4": ([(7 / 8, 4), (1 / 8, 0)], "stretched", [(1, 4)], True),
    "kb-mixed": ([(3 / 8, 8), (5 / 8, 4)], "without bias", [(1, 4)], True),
    "plain-mixed": ([(3 / 8, 8), (5 / 8, 4)], False, [(3 / 8, 4), (1 / 2, 16), (1 / 8, 0)], False),
}


def bands(shares: Shares, head_dim: int) -> tuple[Band, ...]:
    """Widths are rounded to multiples of 8; the last band takes the rest."""
    widths = [round(share * head_dim / 8) * 8 for share, _ in shares[:-1]]
    widths.append(head_dim - sum(widths))
    return tuple(Band(width, bits) for width, (_, bits) in zip(widths, shares, strict=True))


def make_codec(
    name: str, head_dim: int, heads: int, dtype: torch.dtype, device="cpu", block: int = 48
) -> LayerCodec:
    """A codec with random bases."""
    k_shares, rotate_k, v_shares, rotate_v = FORMATS[name]
    layout = ArchiveLayout(head_dim, block, bands(k_shares, head_dim), bands(v_shares, head_dim))

    def basis(wanted: bool | str) -> torch.Tensor | None:
        if not wanted:
            return None
        matrix = torch.linalg.qr(torch.randn(heads, head_dim, head_dim))[0]
        if wanted == "stretched":
            matrix = torch.logspace(-0.5, 0.5, head_dim)[:, None] * matrix
        return matrix.contiguous().to(device)

    k_bias = None
    if rotate_k == "without bias":
        frequencies = 1e6 ** (-torch.arange(head_dim // 2) / (head_dim // 2))
        k_bias = KeyBias(30 * torch.randn(heads, head_dim), frequencies).to(device)
    codec = LayerCodec(layout, basis(rotate_k), basis(rotate_v), dtype, k_bias)
    return codec.with_tables(LONGEST)


def add_bias(codec: LayerCodec, key: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Keys of these positions as a model with the codec's bias would have them."""
    if codec.k_bias is None:
        return key
    return (key.float() + codec.k_bias.turned(positions.to(key.device))).to(key.dtype)


def make_plan(codec: LayerCodec, raw_block: int, policy: Policy) -> LayerPlan:
    """The plan of a layer with this codec. Engines move the boundary by whole archive blocks;
    the ops take any step."""
    layout = codec.layout
    streams = tuple(
        Stream(name, layout.head_dim, parts, "random")
        for name, parts in (("k", layout.k_bands), ("v", layout.v_bands))
    )
    thresholds = (policy.compress_after, policy.keep_recent)
    plan = LayerPlan(streams, codec.dtype, raw_block, layout.block_size, *thresholds)
    plan.__dict__["policy"] = policy
    return plan


def plan_step(
    plan: LayerPlan,
    where: tuple[torch.Tensor, ...],
    recent_table: torch.Tensor,
    archive_table: torch.Tensor,
    slots: torch.Tensor | None = None,
    **attending: object,
) -> StepPlan:
    """A step whose archived parts end where the case says.

    Args:
        where: query_start, lengths, starts.
    """
    query_start, lengths, starts = where
    busy = busy_list(starts, lengths, plan.policy)
    if slots is None:
        slots = torch.full((int(query_start[-1]),), -1, device=lengths.device)
    tables = (recent_table, archive_table)
    return StepPlan(plan, query_start, lengths, starts, busy, slots, *tables, **attending)


def random_tokens(
    tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device="cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as strided views of one fused qkv tensor, sizes apart, one zero vector."""
    x = torch.randn(tokens, 3 * heads, head_dim)
    x *= 10.0 ** torch.randint(-2, 3, (tokens, 3 * heads, 1))
    x[tokens // 2, -1] = 0
    qkv = x.to(dtype).flatten(1).to(device)
    key, value = qkv.unflatten(1, (3 * heads, head_dim)).split([heads, 2 * heads], 1)[1].chunk(2, 1)
    return key, value


def strided_cache(
    blocks: int, heads: int, *rest: int, dtype: torch.dtype, device="cpu", fill: float = 0
) -> torch.Tensor:
    """(blocks, heads, *rest) with room between the blocks and the heads."""
    return torch.full((blocks, heads + 1, *rest), fill, dtype=dtype, device=device)[:, :heads]


def make_table(rows: list[int], device="cpu") -> torch.Tensor:
    """A block table with rows[i] random ids for sequence i, no id twice, 0 elsewhere."""
    ids = torch.randperm(sum(rows)) + 1
    table = torch.zeros(len(rows), max(1, *rows), dtype=torch.int32)
    for row, part in zip(table, ids.split(rows), strict=True):
        row[: len(part)] = part
    return table.to(device)


def step_tensors(sequences: Sequences, device="cpu") -> tuple[torch.Tensor, ...]:
    """query_start, lengths and starts, each int32, as slices that begin at odd places."""
    computed, new, start = torch.tensor([(0, 0, 0), *sequences], dtype=torch.int32).T
    query_start = torch.nn.functional.pad(new.cumsum(0, dtype=torch.int32), (1, 0))
    return tuple(
        x[1:]
        for x in (query_start.to(device), (computed + new).to(device), start.clone().to(device))
    )


def busy_list(starts: torch.Tensor, lengths: torch.Tensor, policy: Policy) -> torch.Tensor:
    """Which sequences archive, by the policy itself: StepPlan.busy."""
    pairs = zip(starts.tolist(), lengths.tolist(), strict=True)
    rows = [row for row, (start, n) in enumerate(pairs) if policy.boundary(n) > start]
    return torch.tensor([len(rows), *rows], dtype=torch.int32, device=starts.device)


def filled_recent(
    blocks: int, heads: int, raw_block: int, head_dim: int, dtype: torch.dtype, device="cpu"
) -> torch.Tensor:
    """Recent pages of random tokens; the null block is NaN."""
    recent = strided_cache(
        blocks, heads, raw_block, 2 * head_dim, dtype=dtype, device=device, fill=float("nan")
    )
    key, value = random_tokens(blocks * raw_block, heads, head_dim, dtype, device)
    store_slots(recent, key, value, torch.arange(blocks * raw_block, device=device))
    return recent


def assert_same_codes(
    actual: torch.Tensor, wanted: torch.Tensor, codec: LayerCodec, blocks=slice(None)
) -> None:
    """Pages are equal: bit for bit without a rotation, within one code step with one.

    With a rotation the order of a float32 sum differs, so a scale may round to the next
    bfloat16 (2^-8 apart: at most half a step at a code of 127, hence one code more or less
    together with the sum's own rounding) and a component next to a tie to the other code. For the
    same reason the scale of 4 bits may have the other sign where a band's largest and smallest
    component are the same in size; codes are then compared after a change of sign.
    """
    layout = codec.layout
    for which, scales_at, parts, basis in (
        ("k", layout.k_scales, layout.k_bands, codec.k_basis),
        ("v", layout.v_scales, layout.v_bands, codec.v_basis),
    ):
        got, want = (layout.codes(x[blocks], which) for x in (actual, wanted))
        got_scales, want_scales = (layout.scales(x, scales_at)[blocks] for x in (actual, wanted))
        if basis is None:
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
            assert torch.equal(got_scales.view(torch.uint8), want_scales.view(torch.uint8))
            continue
        sizes = (got_scales.abs(), want_scales.abs())
        torch.testing.assert_close(*sizes, rtol=2**-7, atol=0, equal_nan=True)
        turned = torch.where(got_scales * want_scales < 0, -1, 1)
        assert float((turned < 0).float().mean()) < 0.005
        stored = [band for band in parts if band.bits]
        column = 0
        for a, b, band in zip(got, want, stored, strict=True):
            if band.bits in QUANTIZED:
                sign = turned[..., column].view(a.shape[:-1])[..., None]
                assert_band_within_one(a, b, band.bits, sign)
                column += 1


def assert_band_within_one(
    a: torch.Tensor, b: torch.Tensor, bits: int, sign: torch.Tensor | int = 1
) -> None:
    if bits == 4:
        pairs = list(zip(signed_nibbles(a), signed_nibbles(b), strict=True))
    elif bits == 8:
        pairs = [(a.view(torch.int8), b.view(torch.int8))]
    for x, y in pairs:
        difference = (x.int() - sign * y.int()).abs()
        assert int(difference.max()) <= 1
        # Ties are rare: a systematic error of one step must not pass as rounding.
        assert float(difference.float().mean()) < 0.01 + 2 / difference.numel()


def assert_expanded(
    actual: torch.Tensor, wanted: torch.Tensor, codec: LayerCodec, which: str
) -> None:
    """Rows of `expand` are equal; with a basis, up to what tf32 drops of it.

    Without a basis there is one float32 product, rounded once. With one, tf32 changes an entry
    by less than 2^-10 of it, so a component by less than 2^-10 of its vector's length, and
    the result may round to the next number. Triton's interpreter multiplies in float32, but
    truncates to bfloat16.
    """
    interpreted = actual.device.type == "cpu"
    basis = codec.k_basis if which == "k" else codec.v_basis
    exact = basis is None and not (interpreted and actual.dtype == torch.bfloat16)
    if exact:
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)
        return
    assert torch.equal(actual.isnan(), wanted.isnan())
    want = wanted.float().nan_to_num()
    near = 0.0 if basis is None else 1e-5 if interpreted else 2.0**-10
    limit = torch.finfo(actual.dtype).eps * want.abs() + near * want.norm(dim=-1, keepdim=True)
    excess = (actual.float().nan_to_num() - want).abs() - limit
    assert float(excess.max()) <= 0, float(excess.max())
