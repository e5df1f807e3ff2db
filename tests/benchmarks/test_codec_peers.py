"""The codec study's emulation of other KV caches, against vLLM's own kernels, interpreted."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
OPS = "vllm.v1.attention.ops."
MODULES = ("triton_decode_attention", "triton_turboquant_decode", "triton_turboquant_store")
TOKENS, HEADS, BLOCK = 21, 2, 16

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels are interpreted")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("codec_peers")


@pytest.fixture
def vllm_ops(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports modules of vLLM's attention kernels with Triton's interpreter in place."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    utils = importlib.import_module("vllm.triton_utils")
    monkeypatch.setattr(utils, "triton", triton)
    monkeypatch.setattr(utils, "tl", tl)

    def load(name: str) -> Any:
        monkeypatch.delitem(sys.modules, OPS + name, raising=False)
        module = importlib.import_module(OPS + name)
        monkeypatch.delitem(sys.modules, OPS + name)  # the next importer gets vLLM's own again
        monkeypatch.setitem(sys.modules, OPS + name, module)
        return module

    return load


@pytest.fixture(params=[64, 128])
def states(request: pytest.FixtureRequest) -> torch.Tensor:
    """(2, tokens, heads, D) K and V with a very large and a zero vector.

    In float32: halfway values, where the interpreter rounds to fp8 unlike a GPU, do not occur.
    """
    x = torch.randn(2, TOKENS, HEADS, request.param, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 100
    x[:, 5] = 0
    return x


@pytest.mark.parametrize("fp8", [True, False])
def test_turboquant(peers: Any, vllm_ops: Any, states: torch.Tensor, fp8: bool):
    _, decode, store = (vllm_ops(name) for name in MODULES)
    from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig

    size = states.shape[-1]
    config = TurboQuantConfig.from_cache_dtype(
        "turboquant_k8v4" if fp8 else "turboquant_4bit_nc", size
    )
    blocks = -(-TOKENS // BLOCK)
    cache = torch.zeros(blocks, BLOCK, HEADS, config.slot_size_aligned, dtype=torch.uint8)
    table = peers.centroids(size)
    rotation = peers.hadamard_basis(size)
    store.triton_turboquant_store(
        states[0],
        states[1],
        cache,
        torch.arange(TOKENS, dtype=torch.int32),
        rotation,
        (table[:-1] + table[1:]) / 2,
        config.mse_bits,
        config.key_packed_size,
        config.value_quant_bits,
        config.key_fp8,
    )
    k, v = (torch.full((1, HEADS, TOKENS, size), torch.nan, dtype=torch.float16) for _ in "kv")
    decode._tq_full_dequant_kv[(TOKENS, HEADS)](
        cache,
        torch.arange(blocks, dtype=torch.int32)[None],
        table,
        k,
        v,
        *k.stride()[:3],
        *v.stride()[:3],
        *cache.stride()[:3],
        blocks,
        HEAD_DIM=size,
        BLOCK_SIZE=BLOCK,
        NUM_KV_HEADS=HEADS,
        MSE_BYTES=size * config.mse_bits // 8,
        KPS=config.key_packed_size,
        VQB=4,
        VAL_DATA_BYTES=size // 2,
        MSE_BITS=config.mse_bits,
        KEY_FP8=int(fp8),
        BLOCK_D=size,
        NORM_CORRECTION=int(config.norm_correction),
    )
    mine_k, mine_v = states.transpose(1, 2)
    assert torch.equal(peers.turboquant_v4(mine_v).half(), v[0])
    if fp8:
        # The interpreter forgets the carry where rounding reaches the next power of two, and
        # knows no subnormal numbers.
        mine = peers.fp8(mine_k)
        carried = (torch.frexp(mine)[0].abs() == 0.5) & (mine.abs() > mine_k.abs())
        fair = ~carried & (mine_k.abs() > 2**-6)
        assert fair.float().mean() > 0.85
        assert torch.equal(mine[fair].half(), k[0][fair])
    else:
        # vLLM keeps K rotated and rounds it to float16 here: half a unit of the last place.
        expected = k[0].float() @ rotation
        error = (peers.turboquant_k4(mine_k) - expected).norm(dim=-1) / (expected.norm(dim=-1) + 1)
        assert error.max() < 2**-11
    _, bytes_of_k = peers.PEERS["fp8" if fp8 else "turboquant-k4"]
    _, bytes_of_v = peers.PEERS["turboquant-v4"]
    assert bytes_of_k(size) + bytes_of_v(size) == config.slot_size_aligned


def test_int8_per_token_head(peers: Any, vllm_ops: Any, states: torch.Tensor):
    ops = vllm_ops("triton_reshape_and_cache_flash")
    size = states.shape[-1]
    blocks = -(-TOKENS // BLOCK)
    codes = [torch.zeros(blocks, BLOCK, HEADS, size, dtype=torch.int8) for _ in "kv"]
    scales = [torch.zeros(blocks, BLOCK, HEADS) for _ in "kv"]
    from vllm.v1.kv_cache_interface import KVQuantMode

    ops.triton_reshape_and_cache_flash_per_token_head_quant(
        *states, *codes, *scales, torch.arange(TOKENS), KVQuantMode.INT8_PER_TOKEN_HEAD
    )
    for x, code, scale in zip(states, codes, scales, strict=True):
        expected = (code.float() * scale[..., None]).flatten(0, 1)[:TOKENS]
        assert torch.equal(peers.int8_per_token_head(x), expected)
