"""What the bench of decode attention times: FlashAttention-3 and TurboQuant as vLLM ships them,
and our kernel, each over a paged cache of its own filled with random content."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from vllm_kvpca.calibration.collect import AttentionShape
from vllm_kvpca.lab.presets import random_preset
from vllm_kvpca.ops.attend.softmax import Softmax
from vllm_kvpca.ops.layer_cache import LayerCache
from vllm_kvpca.ops.layer_codec import LayerCodec, codec_of
from vllm_kvpca.pages.block_sizes import choose_blocks
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.pages.layout import raw_token_bytes
from vllm_kvpca.pages.step_plan import StepTokens
from vllm_kvpca.preset import Preset, load_preset
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS

Call = Callable[[int], Any]
"""Attention over one set of blocks, by its index."""

ROTATE_BYTES = 1 << 28
"""Bytes of all sets together: several times the L2 of any GPU."""
STOCK_BLOCK = 16
FLASH_SPLITS = 32
"""Most splits that vLLM lets FlashAttention-3 make in a CUDA graph (its default)."""
ALL_ARCHIVED = ", all archived"
"""After a preset's name: without the raw tokens that keep_recent leaves in a running engine."""
PEERS = ("fa3-bf16", "fa3-fp8", "turboquant_k8v4", "turboquant_4bit_nc")


@dataclass(frozen=True)
class Shape:
    """A decode batch: sequences, tokens of each, and the model's heads."""

    batch: int
    context: int
    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128

    @property
    def name(self) -> str:
        return f"{self.batch}x{self.context}"

    def sets(self, token_bytes: float) -> int:
        """Disjoint sets of blocks to go round."""
        one = self.batch * self.context * self.kv_heads * token_bytes
        return max(1, min(8, -(-ROTATE_BYTES // int(one))))


def _tables(shape: Shape, sets: int, block: int, tokens: int) -> tuple[torch.Tensor, int]:
    """(sets, batch, width) int32 block ids in random order, and how many there are."""
    width = -(-tokens // block)
    count = sets * shape.batch * width
    ids = torch.randperm(count, device="cuda", dtype=torch.int32) + 1
    return ids.view(sets, shape.batch, width), count + 1


def _query(shape: Shape) -> torch.Tensor:
    size = (shape.batch, shape.heads, shape.head_dim)
    return torch.randn(size, device="cuda", dtype=torch.bfloat16)


def _lengths(shape: Shape) -> torch.Tensor:
    return torch.full((shape.batch,), shape.context, dtype=torch.int32, device="cuda")


def _flash(shape: Shape, name: str) -> tuple[Call, int, float]:
    """FlashAttention-3 over vLLM's pages, scheduled ahead as under vLLM's CUDA graphs; fp8 with
    queries in fp8 too, as vLLM does it."""
    from vllm.v1.attention.backends.fa_utils import (
        flash_attn_varlen_func,
        get_scheduler_metadata,
    )

    fp8 = name == "fa3-fp8"
    token_bytes = raw_token_bytes(shape.head_dim) // (2 if fp8 else 1)
    sets = shape.sets(token_bytes)
    tables, blocks = _tables(shape, sets, STOCK_BLOCK, shape.context)
    size = (blocks, STOCK_BLOCK, shape.kv_heads, shape.head_dim)
    query = _query(shape)
    out = torch.empty_like(query)
    key, value = (torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    scales: dict[str, torch.Tensor] = {}
    if fp8:
        query, key, value = (x.to(torch.float8_e4m3fn) for x in (query, key, value))
        one = torch.ones(1, device="cuda").expand(shape.batch, shape.kv_heads)
        scales = {f"{which}_descale": one for which in "qkv"}
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda")
    lengths = _lengths(shape)
    plan = get_scheduler_metadata(
        batch_size=shape.batch,
        max_seqlen_q=1,
        max_seqlen_k=shape.context,
        num_heads_q=shape.heads,
        num_heads_kv=shape.kv_heads,
        headdim=shape.head_dim,
        cache_seqlens=lengths,
        qkv_dtype=query.dtype,
        cu_seqlens_q=starts,
        page_size=STOCK_BLOCK,
        causal=True,
        num_splits=FLASH_SPLITS,
    )

    def call(index: int) -> None:
        flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=shape.context,
            softmax_scale=shape.head_dim**-0.5,
            causal=True,
            block_table=tables[index],
            scheduler_metadata=plan,
            num_splits=FLASH_SPLITS,
            fa_version=3,
            **scales,
        )

    return call, sets, token_bytes


def _turboquant(shape: Shape, name: str) -> tuple[Call, int, float]:
    """TurboQuant's decode kernel over its own slots, filled by its own store kernel."""
    from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
    from vllm.v1.attention.ops.triton_turboquant_decode import triton_turboquant_decode_attention

    from vllm_kvpca.codec.basis import hadamard_basis

    config = TurboQuantConfig.from_cache_dtype(name, shape.head_dim)
    sets = shape.sets(config.slot_size_aligned)
    tables, blocks = _tables(shape, sets, STOCK_BLOCK, shape.context)
    size = (blocks, STOCK_BLOCK, shape.kv_heads, config.slot_size_aligned)
    # Any bytes do: 0x38 is 1.0 in fp8 e4m3 and 0.5 as the high byte of fp16.
    cache = torch.full(size, 0x38, dtype=torch.uint8, device="cuda")
    rotation = hadamard_basis(shape.head_dim).cuda()
    bits = 0 if config.key_fp8 else config.key_mse_bits
    centroids = get_centroids(shape.head_dim, config.centroid_bits).cuda().float()
    query, lengths = _query(shape), _lengths(shape)
    holder = type("Buffers", (), {})()
    out = torch.empty_like(query)

    def call(index: int) -> None:
        triton_turboquant_decode_attention(
            query=query,
            kv_cache=cache,
            block_table=tables[index],
            seq_lens=lengths,
            Pi=rotation,
            centroids=centroids,
            scale=shape.head_dim**-0.5,
            mse_bits=bits,
            key_packed_size=config.key_packed_size,
            value_quant_bits=config.effective_value_quant_bits,
            key_fp8=config.key_fp8,
            norm_correction=config.norm_correction,
            PiT=rotation,
            output_buf=out,
            buf_holder=holder,
        )

    return call, sets, config.slot_size_aligned


def _ours(shape: Shape, name: str) -> tuple[Call, int, float]:
    """Our kernel as the engine calls it: page plan and policy of the default thresholds, or
    of none where all is to be archived (up to whole blocks)."""
    from vllm_kvpca.ops.attend.decode import decode, list_chunks, make_chunks, make_workspace
    from vllm_kvpca.ops.table import make_step, ops_for

    device = torch.device("cuda")
    plan, cache_codec = _layer(name, shape, device)
    content = plan.archive.content_bytes
    sets = shape.sets(content)
    archived = plan.policy.boundary(shape.context)
    archive_tables, blocks = _tables(shape, sets, plan.archive_block, max(1, archived))
    # Raw rows below the boundary are null, as the cache manager leaves them.
    first = archived // plan.raw_block
    tail = max(1, shape.context - first * plan.raw_block)
    tails, tail_blocks = _tables(shape, sets, plan.raw_block, tail)
    recent_tables = torch.nn.functional.pad(tails, (first, 0))
    head_bytes = plan.archive.head_bytes
    pages = torch.randint(
        0, 256, (blocks, shape.kv_heads, head_bytes), dtype=torch.uint8, device=device
    )
    for region in (plan.archive.k_scales, plan.archive.v_scales):
        plan.archive.scales(pages, region).fill_(0.01)
    size = (tail_blocks, shape.kv_heads, plan.raw_block, 2 * shape.head_dim)
    cache = LayerCache(torch.randn(size, device=device, dtype=plan.dtype), pages, cache_codec)
    query = _query(shape)
    key, value = torch.randn(
        2, shape.batch, shape.kv_heads, shape.head_dim, device=device, dtype=plan.dtype
    )
    tokens = StepTokens(query, key, value, torch.empty_like(query))
    heads = (shape.heads, shape.kv_heads, shape.head_dim)
    workspace = make_workspace(
        shape.batch, *heads, shape.context, device, key_bias=cache_codec.k_bias is not None
    )
    chunks = make_chunks(workspace, shape.batch)
    query_start = torch.arange(shape.batch + 1, dtype=torch.int32, device=device)
    steps = [
        make_step(
            ops_for(device),
            plan,
            query_start,
            _lengths(shape),
            recent_tables[index],
            archive_tables[index],
            decodes=shape.batch,
            chunks=chunks,
        )
        for index in range(sets)
    ]
    # Once per step, not per layer, like FlashAttention's scheduler metadata. All sets are alike.
    for step in steps:
        step.once("decode chunks", partial(list_chunks, step, workspace))
    softmax = Softmax(shape.head_dim**-0.5)

    def call(index: int) -> None:
        decode(steps[index], tokens, cache, softmax, workspace)

    mean = archived * content + (shape.context - archived) * plan.raw_token_bytes
    return call, sets, mean / shape.context


def _layer(name: str, shape: Shape, device: torch.device) -> tuple[LayerPlan, LayerCodec]:
    """Plan and codec of a layer that stores its cache by this preset."""
    preset = _preset(name.removesuffix(ALL_ARCHIVED), shape)
    after, kept = (0, 0) if name.endswith(ALL_ARCHIVED) else (512, 256)
    blocks = choose_blocks(
        raw_token_bytes(shape.head_dim),
        preset.layout(shape.head_dim).content_bytes,
        compress_after=after,
        keep_recent=kept,
    )
    streams, dtype = preset.streams(shape.head_dim), torch.bfloat16
    plan = LayerPlan(streams, dtype, blocks.raw_block, blocks.archive_block, after, kept)
    first = (preset.config.layers or (0,))[0]  # a preset may cover some layers only
    heads = list(range(shape.kv_heads))
    codec = codec_of(preset, first, heads, plan.archive, dtype, device)
    return plan, codec.with_tables(shape.context)


def _preset(name: str, shape: Shape) -> Preset:
    """A preset; a calibrated format by its name has random bases."""
    if name in CALIBRATED_FORMATS:
        heads = AttentionShape(1, shape.kv_heads, shape.head_dim, (0,))
        return random_preset(name, "one layer", heads)
    return load_preset(name)


def build(shape: Shape, name: str) -> tuple[Call, int, float]:
    """One contender, ready to be called.

    Args:
        name: one of PEERS, a preset or a calibrated format.

    Returns:
        The call, how many disjoint sets of blocks it can go round, and the stored bytes of a
        token and head.
    """
    if name in PEERS:
        return (_flash if name.startswith("fa3") else _turboquant)(shape, name)
    return _ours(shape, name)
