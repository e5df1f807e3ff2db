"""Other KV caches of vLLM in place of a preset."""

import sys
from pathlib import Path

import pytest

from vllm_kvpca.errors import PresetNotFound
from vllm_kvpca.lab import against_stock, engine, presets
from vllm_kvpca.lab.docs import tables
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.peers import PEERS

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "benchmarks" / "models" / "Qwen2.5-7B-shaped")


@pytest.mark.parametrize("name", PEERS)
def test_the_engine_gets_vllms_own_option_and_no_compression(name):
    arguments = engine.arguments(EngineSettings(model="m", preset=name, max_model_len=100))
    assert f"stock-{arguments['kv_cache_dtype']}" == name
    assert "additional_config" not in arguments


def test_vllm_knows_these_caches():
    source = Path(sys.modules["torch"].__file__).parents[1] / "vllm" / "config" / "cache.py"
    names = source.read_text()
    assert all(f'"{peer.kv_cache_dtype}"' in names for peer in PEERS.values())


def test_ratios_count_scales():
    """The emulation of the codec study says how many bytes there are."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from codec_peers import PEERS as EMULATED
    finally:
        sys.path.pop(0)
    parts = {
        "stock-fp8": ("fp8", "fp8"),
        "stock-int8_per_token_head": ("int8-token-head", "int8-token-head"),
        "stock-turboquant_k8v4": ("fp8", "turboquant-v4"),
        "stock-turboquant_4bit_nc": ("turboquant-k4", "turboquant-v4"),
    }
    for name, (k, v) in parts.items():
        stored = EMULATED[k][1](128) + EMULATED[v][1](128)
        assert presets.facts(name, MODEL)["total_ratio"] == pytest.approx(512 / stored)
        assert presets.facts(name, MODEL)["v_ratio"] == pytest.approx(256 / EMULATED[v][1](128))


def test_a_peer_is_measured_once_whatever_the_thresholds(make):
    common = EngineSettings(model="m", max_model_len=100)
    both = [(0, 0), (512, 256)]
    todo = against_stock.variants(common, ["stock-fp8", "k8v4"], both)
    assert [one.preset for one in todo] == ["stock-fp8", "k8v4", "k8v4"]
    assert against_stock.overlaps(["stock-fp8"], []) == {"stock-fp8": 0}
    parted = {
        "prompts": [{}],
        "generated_tokens": 8,
        "same_tokens_quartiles": [1.0, 2.5, 4.0],
        "never_parted": 0.5,
        "gap_median_nats": 0.02,
        "dtype": "float16",
    }
    facts = presets.facts("stock-fp8", MODEL)
    text = tables.table("divergence", [make(kind="divergence", results=parted, **facts)])
    assert "| `stock-fp8` | 2.00x (2.00x) |  | float16 |" in text


def test_only_measurements_that_run_them_take_their_names():
    presets.check(["stock-fp8", "k8v4"], MODEL, peers=True)
    with pytest.raises(PresetNotFound):
        presets.check(["stock-fp8"], MODEL)
    with pytest.raises(PresetNotFound):
        presets.check(["stock-fp4"], MODEL, peers=True)
