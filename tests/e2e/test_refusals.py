"""What cannot be served is refused before any process or memory is taken, with the way out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from engines import model
from vllm.engine.arg_utils import EngineArgs
from vllm.plugins import load_general_plugins

from vllm_kvpca.errors import KvpcaError, OptionsError, PresetNotFound, UnsupportedError
from vllm_kvpca.preset import list_shipped

pytestmark = pytest.mark.e2e

K8V4 = {"preset": "k8v4"}


@pytest.fixture(autouse=True)
def plugin(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    load_general_plugins()


def configure(compression, **arguments):
    """The configuration of an engine, made as `vllm serve` makes it."""
    additional = {} if compression is None else {"kv_compression": compression}
    arguments = {"model": model(), "max_model_len": 4096, **arguments}
    return EngineArgs(additional_config=additional, **arguments).create_engine_config()


def test_a_sound_configuration_selects_the_backend():
    config = configure(K8V4)
    assert config.attention_config.backend_per_kind["full_attention"].name == "CUSTOM"
    assert config.additional_config["kv_compression"] == {
        "preset": "k8v4",
        "compress_after": 512,
        "keep_recent": 256,
        "allow_other_weights": False,
    }


def test_without_the_option_vllm_is_untouched():
    config = configure(None)
    assert config.attention_config.backend_per_kind == {}
    assert config.additional_config == {}


@pytest.mark.parametrize(
    ("compression", "error", "words"),
    [
        ({"preset": "nonsense"}, PresetNotFound, "k8v4"),
        ({"compress_after": 10}, OptionsError, "--kv-compression-preset"),
        ({**K8V4, "keep_recent": 600}, OptionsError, "Lower --kv-keep-recent"),
        ({**K8V4, "compress_after": -1}, OptionsError, "0 or more"),
        ({**K8V4, "keep_last": 5}, OptionsError, "keep_last"),
        ({**K8V4, "keep_recent": "many"}, OptionsError, "keep_recent"),
    ],
)
def test_wrong_options(compression, error, words):
    with pytest.raises(error, match=words):
        configure(compression)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype fp8"),
        ({"dtype": "float32"}, "--dtype float32"),
        ({"disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
        (
            {
                "speculative_config": {
                    "method": "ngram",
                    "num_speculative_tokens": 2,
                    "prompt_lookup_max": 3,
                }
            },
            "speculative decoding",
        ),
        (
            {
                "kv_transfer_config": {
                    "kv_connector": "ExampleConnector",
                    "kv_role": "kv_both",
                }
            },
            "KV transfer",
        ),
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    ],
)
def test_combinations_that_are_not_supported(arguments, words):
    with pytest.raises(UnsupportedError, match=words) as refusal:
        configure(K8V4, **arguments)
    assert "serve without --kv-compression-preset" in str(refusal.value)


def test_a_preset_of_another_model(tmp_path):
    """A calibrated preset is refused for a model of another shape, naming what differs."""
    from transformers import LlamaConfig

    calibrated = next(name for name, folder in list_shipped().items() if folder)
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2
    )
    config.architectures = ["LlamaForCausalLM"]
    config.torch_dtype = "bfloat16"
    config.save_pretrained(tmp_path / "other-model")
    with pytest.raises(KvpcaError, match=r"num_layers 30 \(the model has 2\)"):
        configure(
            {"preset": calibrated},
            model=str(tmp_path / "other-model"),
            skip_tokenizer_init=True,
            max_model_len=256,
        )


def test_the_command_line_shows_one_message_and_no_server():
    """`vllm serve` with a wrong preset ends at once; the last line says what to do."""
    command = [Path(sys.executable).parent / "vllm", "serve", model(), "--port", "8"]
    command += ["--kv-compression-preset", "nonsense"]
    process = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert "there is no preset 'nonsense'" in last
    assert "k8v4" in last


def test_the_flags_have_a_group_of_their_own_in_the_help():
    command = [Path(sys.executable).parent / "vllm", "serve", "--help=all"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    group = text[text.index("KV compression:") :]
    assert "--kv-compression-preset" in group
    assert "--kv-compress-after" in group
    assert "--kv-keep-recent" in group
