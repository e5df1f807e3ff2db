"""What vLLM thinks fits is what fits: its estimate, its advice and the length it chooses itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine import core
from vllm.v1.kv_cache_interface import KVCacheConfig, MambaSpec, SlidingWindowSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvpca.errors import OptionsError, UnsupportedError
from vllm_kvpca.preset import FORMATS, Preset
from vllm_kvpca.serving.cache.pairs import ARCHIVE_SUFFIX
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.register import register
from vllm_kvpca.serving.settings.options import CompressionOptions
from vllm_kvpca.serving.step.attach import make_specs

LAYERS, KV_HEADS, HEAD_DIM = 30, 3, 64
MEMORY = 45_000_000


def configure(folder: Path, max_model_len: int, **arguments) -> VllmConfig:
    """An engine for a model of SmolLM2's shape, as `vllm serve` configures it."""
    register()
    config = LlamaConfig(
        hidden_size=576,
        num_attention_heads=9,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=LAYERS,
        max_position_embeddings=8192,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.save_pretrained(folder)
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        max_model_len=max_model_len,
        additional_config={"kv_compression": {"preset": "k8v4"}},
        **arguments,
    ).create_engine_config()
    config.cache_config.kv_cache_layout = KVCacheLayout.BLHNC.name
    return config


def specs_of(config: VllmConfig, full: int, sliding: int) -> dict:
    """The cache specs of all layers, as the workers report them."""
    shape = {"num_kv_heads": KV_HEADS, "head_size": HEAD_DIM}
    layer = SimpleNamespace(kv_cache_torch_dtype=torch.bfloat16, **shape)
    options = CompressionOptions.of(config)
    preset = Preset("k8v4", FORMATS["k8v4"])
    recent, archive = make_specs(config, options, preset, layer)
    specs = {f"layers.{i}": recent for i in range(full)}
    specs |= {f"layers.{i}{ARCHIVE_SUFFIX}": archive for i in range(full)}
    window = SlidingWindowSpec(block_size=16, sliding_window=100, dtype=torch.bfloat16, **shape)
    return specs | {f"layers.{full + i}": window for i in range(sliding)}


def fit(config: VllmConfig, memory: int, full: int = LAYERS, sliding: int = 0) -> KVCacheConfig:
    """vLLM's decision about the pool.

    Raises:
        ValueError: one sequence of max_model_len tokens does not fit.
    """
    specs = specs_of(config, full, sliding)
    arguments = [config, [specs], [memory]]
    if "global_kv_cache_groups" in inspect.signature(core.get_kv_cache_configs).parameters:
        arguments.append(core.get_global_kv_cache_groups(config, [specs]))
    (found,) = core.get_kv_cache_configs(*arguments)
    return found


@pytest.mark.parametrize(("full", "sliding"), [(30, 0), (12, 4), (9, 6)])
def test_the_length_that_a_refusal_names_works(tmp_path, full, sliding):
    memory = MEMORY if not sliding else MEMORY * 2 * full // LAYERS
    with pytest.raises(ValueError, match="estimated maximum model length is") as refusal:
        fit(configure(tmp_path, 8192), memory, full, sliding)
    advised = int(re.search(r"maximum model length is (\d+)", str(refusal.value))[1])
    assert 1024 < advised < 8192
    config = configure(tmp_path, advised)
    found = fit(config, memory, full, sliding)
    need = 0
    for group in found.kv_cache_groups:
        spec = group.kv_cache_spec
        need += -(-spec.max_memory_usage_bytes(config) // spec.page_size_bytes)
        if isinstance(spec, RecentSpec | ArchiveSpec):
            assert spec.peak_blocks(advised) * spec.page_size_bytes == (
                spec.max_memory_usage_bytes(config)
            )
    assert need <= found.num_blocks - 1
    with pytest.raises(ValueError, match="estimated"):
        fit(configure(tmp_path, advised + 200), memory, full, sliding)


def test_auto_fits_the_memory(tmp_path):
    config = configure(tmp_path, -1)
    fit(config, MEMORY)
    chosen = config.model_config.max_model_len
    assert 1024 < chosen < 8192
    fit(configure(tmp_path, chosen), MEMORY)


def test_vllm_reports_as_capacity_what_decoding_sequences_hold(tmp_path):
    config = configure(tmp_path, 4096)
    found = fit(config, 4 * MEMORY)
    specs = [group.kv_cache_spec for group in found.kv_cache_groups]
    peak = sum(spec.max_memory_usage_bytes(config) for spec in specs)
    config.cache_config.num_gpu_blocks = found.num_blocks
    decoding = sum(spec.max_memory_usage_bytes(config) for spec in specs)
    assert decoding == sum(spec.decoding_blocks(4096) * spec.page_size_bytes for spec in specs)
    assert decoding < peak


def test_too_few_blocks_are_blamed_on_the_option(tmp_path):
    config = configure(tmp_path, 4096, num_gpu_blocks_override=20)
    with pytest.raises(OptionsError, match="--num-gpu-blocks-override 20 leaves 19"):
        fit(config, MEMORY)


def test_a_block_size_of_the_user_s_is_the_raw_block(tmp_path):
    for size in (48, 64, 256):
        config = configure(tmp_path, 2048, block_size=size)
        sizes = [spec.block_size for spec in specs_of(config, 1, 0).values()]
        assert sizes[0] == size < sizes[1]


@pytest.mark.parametrize("kind", ["sliding", "mamba"])
def test_a_model_in_which_nothing_is_compressed_is_refused(tmp_path, kind):
    config = configure(tmp_path, 2048)
    mamba = MambaSpec(block_size=16, shapes=((4, 4),), dtypes=(torch.bfloat16,))
    specs = {"layers.0": mamba} if kind == "mamba" else specs_of(config, 0, 3)
    specs = {name: spec for name, spec in specs.items() if not isinstance(spec, ArchiveSpec)}
    words = r"1 Mamba" if kind == "mamba" else r"3 SlidingWindow"
    with pytest.raises(UnsupportedError, match=rf"compress nothing of this model.*{words}"):
        core.get_kv_cache_configs(config, [specs], [MEMORY])
