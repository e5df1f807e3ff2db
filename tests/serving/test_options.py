"""Options of an engine, and what it refuses before any memory is taken."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from vllm.config import (
    CacheConfig,
    KVEventsConfig,
    LoadConfig,
    ModelConfig,
    ParallelConfig,
    SchedulerConfig,
    VllmConfig,
    set_current_vllm_config,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor import parameter
from vllm.model_executor.layers import linear

from vllm_kvpca.errors import LayoutError, OptionsError, PresetMismatch, UnsupportedError
from vllm_kvpca.preset import FORMATS, ModelShape, Preset, PresetConfig
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS
from vllm_kvpca.preset.identity import Served
from vllm_kvpca.preset.weights import SAMPLES, WeightSamples
from vllm_kvpca.serving.register import register
from vllm_kvpca.serving.settings import options as options_module
from vllm_kvpca.serving.settings import refusals
from vllm_kvpca.serving.settings.options import (
    CompressionOptions,
    full_attention_layers,
    has_key_bias,
    model_shape,
    served_model,
)
from vllm_kvpca.serving.settings.refusals import check_engine
from vllm_kvpca.serving.step.attach import local_kv_heads

# --- parsing --------------------------------------------------------------------------------


def test_thresholds_have_defaults():
    options = CompressionOptions.parse({"preset": "k8v4"})
    assert (options.compress_after, options.keep_recent) == (512, 256)
    unset = {"preset": "k8v4", "compress_after": None, "keep_recent": None}
    assert CompressionOptions.parse(unset) == options


def test_options_come_from_additional_config():
    values = {"preset": "k8v4", "compress_after": 100, "keep_recent": 0}
    config = SimpleNamespace(additional_config={"kv_compression": values})
    assert CompressionOptions.of(config).model_dump() == values | {"allow_other_weights": False}
    for empty in (None, {}, {"other": 1}):
        assert CompressionOptions.of(SimpleNamespace(additional_config=empty)) is None


@pytest.mark.parametrize(
    ("model", "preset"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB--SmolLM2-135M-Instruct/k5.5v5.5"),
        ("/models/smollm2-135m-instruct", "HuggingFaceTB--SmolLM2-135M-Instruct/k5.5v5.5"),
        ("org/Other", "k8v4"),
    ],
)
def test_auto_is_the_model_s_preset_or_one_for_any_model(monkeypatch, model, preset):
    """By the name, because these models are not on this machine."""
    logged = []
    monkeypatch.setattr(options_module.logger, "info", lambda text, *args: logged.append(args))
    options = CompressionOptions.parse({"preset": "auto", "compress_after": 700})
    assert options.resolved(Served(model)) == options.model_copy(update={"preset": preset})
    assert [args[0] for args in logged] == [preset]
    other = CompressionOptions.parse({"preset": "k8v8"})
    assert other.resolved(Served(model)) is other


def test_auto_looks_at_the_model_before_the_engine_starts(monkeypatch):
    """The real road: vLLM's arguments to vLLM's configuration, with no weights at hand."""
    folder = Path(__file__).parents[2] / "benchmarks" / "models" / "Qwen2.5-7B-shaped"
    logged = []
    monkeypatch.setattr(options_module.logger, "info", lambda text, *args: logged.append(args))
    register()
    config = EngineArgs(
        model=str(folder),
        skip_tokenizer_init=True,
        additional_config={"kv_compression": {"preset": "auto"}},
    ).create_engine_config()
    assert CompressionOptions.of(config).preset == "Qwen--Qwen2.5-7B/kh8v4"
    assert "not measured on it" in logged[0][1]


@pytest.mark.parametrize(
    ("config", "bias"),
    [
        (Qwen2Config(), True),
        (LlamaConfig(), False),
        (LlamaConfig(attention_bias=True), True),
        (Qwen3Config(), False),
    ],
)
def test_models_whose_keys_have_a_bias(config, bias):
    assert has_key_bias(config) is bias


def test_shape_of_a_model():
    config = Qwen2Config(
        hidden_size=896, num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=24
    )
    assert model_shape(config) == (24, 2, 64)
    assert model_shape(Qwen3Config(head_dim=128))[2] == 128
    assert model_shape(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("k8v4", r'additional_config\["kv_compression"\] must be a dictionary'),
        (["k8v4"], r"must be a dictionary"),
        ({}, r"needs a preset.*--kv-compression-preset.*k8v4"),
        ({"preset": ""}, r"needs a preset"),
        ({"preset": None}, r"needs a preset"),
        ({"preset": 8}, r"preset: .*string.*Known options: preset, compress_after, keep_recent"),
        ({"preset": "k8v4", "compress": 1}, r"compress: Extra inputs.*Known options: preset"),
        ({"preset": "k8v4", "compress_after": "many"}, r"compress_after: .*integer"),
        ({"preset": "k8v4", "keep_recent": 1.5}, r"keep_recent: .*integer"),
        ({"preset": "k8v4", "compress_after": -1, "keep_recent": 0}, r"--kv-compress-after"),
        ({"preset": "k8v4", "keep_recent": -1}, r"keep_recent is -1.*--kv-keep-recent"),
        (
            {"preset": "k8v4", "compress_after": 100},
            r"keep_recent \(256\) exceeds compress_after \(100\)",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(values, words):
    with pytest.raises(OptionsError, match=words):
        CompressionOptions.parse(values)


# --- what compression cannot be combined with -----------------------------------------------

SUPPORTED = {
    "kv_transfer_config": None,
    "kv_events_config": None,
    "speculative_config": None,
    "cache_config.kv_offloading_size": None,
    "cache_config.cache_dtype": "auto",
    "cache_config.block_size": 16,
    "cache_config.user_specified_block_size": False,
    "cache_config.kv_sharing_fast_prefill": False,
    "parallel_config.decode_context_parallel_size": 1,
    "parallel_config.prefill_context_parallel_size": 1,
    "parallel_config.pipeline_parallel_size": 1,
    "parallel_config.use_ubatching": False,
    "scheduler_config.disable_hybrid_kv_cache_manager": None,
    "additional_config": None,
    "load_config.download_dir": None,
    "model_config.model": "org/Model-1B",
    "model_config.revision": None,
    "model_config.hf_config": SimpleNamespace(),
    "model_config.hf_text_config": SimpleNamespace(),
    "model_config.runner_type": "generate",
    "model_config.is_encoder_decoder": False,
    "model_config.use_mla": False,
    "model_config.is_mm_prefix_lm": False,
    "model_config.rswa_window": None,
    "model_config.dtype": torch.bfloat16,
    "model_config.get_total_num_hidden_layers": lambda: 4,
    "model_config.get_total_num_kv_heads": lambda: 2,
    "model_config.get_head_size": lambda: 64,
}

UNSUPPORTED = {
    "kv_transfer_config": (object(), "KV transfer and offloading (--kv-transfer-config)"),
    "kv_events_config": (SimpleNamespace(enable_kv_cache_events=True), "KV cache events"),
    "speculative_config": (object(), "speculative decoding (--speculative-config)"),
    "cache_config.kv_offloading_size": (4.0, "KV offloading (--kv-offloading-size)"),
    "cache_config.cache_dtype": (
        "fp8",
        "--kv-cache-dtype fp8 (a preset defines the stored format; use auto)",
    ),
    "cache_config.kv_sharing_fast_prefill": (True, "--kv-sharing-fast-prefill"),
    "parallel_config.decode_context_parallel_size": (
        2,
        "--decode-context-parallel-size above 1",
    ),
    "parallel_config.prefill_context_parallel_size": (
        2,
        "--prefill-context-parallel-size above 1",
    ),
    "parallel_config.pipeline_parallel_size": (2, "--pipeline-parallel-size above 1"),
    "parallel_config.use_ubatching": (True, "micro-batching (--enable-dbo)"),
    "scheduler_config.disable_hybrid_kv_cache_manager": (
        True,
        "--disable-hybrid-kv-cache-manager",
    ),
    "model_config.runner_type": ("pooling", "--runner pooling"),
    "model_config.is_encoder_decoder": (True, "encoder-decoder models"),
    "model_config.use_mla": (True, "MLA models"),
    "model_config.is_mm_prefix_lm": (True, "models with bidirectional attention over images"),
    "model_config.rswa_window": (128, "models with reference sliding windows"),
    "model_config.dtype": (torch.float32, "--dtype float32 (use bfloat16 or float16)"),
}
"""What is set, to what, and the words that the refusal must have for it."""


def make_engine(changes: dict | None = None) -> SimpleNamespace:
    """A configuration that is supported but for the changes."""
    config = SimpleNamespace()
    for path, value in (SUPPORTED | (changes or {})).items():
        part, _, name = path.rpartition(".")
        if part and not hasattr(config, part):
            setattr(config, part, SimpleNamespace())
        setattr(getattr(config, part) if part else config, name, value)
    return config


PRESET = Preset("k8v4", FORMATS["k8v4"])


def test_a_plain_engine_is_accepted():
    check_engine(make_engine(), PRESET)
    check_engine(make_engine({"model_config.dtype": torch.float16}), PRESET)
    quiet = SimpleNamespace(enable_kv_cache_events=False)
    check_engine(make_engine({"kv_events_config": quiet}), PRESET)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_raw_cache_has_the_type_of_the_model(dtype):
    """vLLM 0.33 refuses another one itself, 0.32 does not."""
    for name in ("bfloat16", "float16"):
        engine = make_engine({"model_config.dtype": dtype, "cache_config.cache_dtype": name})
        if str(dtype) == f"torch.{name}":
            check_engine(engine, PRESET)
        else:
            with pytest.raises(UnsupportedError, match=f"--kv-cache-dtype {name}"):
                check_engine(engine, PRESET)


@pytest.mark.parametrize(
    ("size", "works"), [(16, False), (24, False), (36, False), (32, True), (48, True), (256, True)]
)
def test_a_block_size_is_the_raw_block_s_or_refused(size, works):
    changes = {"cache_config.block_size": size, "cache_config.user_specified_block_size": True}
    if works:
        return check_engine(make_engine(changes), PRESET)
    with pytest.raises(OptionsError, match=rf"--block-size {size}: .*multiple of 8 from 32 on"):
        check_engine(make_engine(changes), PRESET)


FP8 = {"num_bits": 8, "type": "float", "dynamic": False, "strategy": "tensor", "symmetric": True}
CHECKPOINTS = {
    "kv_cache_scheme": [
        {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FP8},
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": FP8},
    ],
    "kv_cache_quant_algo": [
        {
            "quant_method": "modelopt",
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
        },
        {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
    ],
}


def configure(folder: Path, changes: dict, **arguments) -> VllmConfig:
    """The real road, from vLLM's arguments to its configuration, with no weights at hand."""
    register()
    config = LlamaConfig(
        hidden_size=192, num_attention_heads=3, num_key_value_heads=3, num_hidden_layers=2
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "bfloat16"
    config.update(changes)
    config.save_pretrained(folder)
    options = {"kv_compression": {"preset": "k8v4"}}
    arguments = {"skip_tokenizer_init": True, "max_model_len": 2048, **arguments}
    return EngineArgs(
        model=str(folder), additional_config=options, **arguments
    ).create_engine_config()


@pytest.mark.parametrize(
    ("setting", "quantization"),
    [(k, value) for k, values in CHECKPOINTS.items() for value in values],
)
def test_a_checkpoint_that_quantizes_the_cache_is_named_with_a_remedy_that_works(
    tmp_path, setting, quantization
):
    changes = {"quantization_config": quantization}
    with pytest.raises(UnsupportedError, match=rf"\({setting}\).*add --kv-cache-dtype bfloat16"):
        configure(tmp_path, changes)
    configure(tmp_path, changes, kv_cache_dtype="bfloat16")


def test_vllm_tells_a_block_size_that_the_user_has_set(tmp_path):
    assert configure(tmp_path, {}, block_size=48).cache_config.block_size == 48
    with pytest.raises(OptionsError, match="--block-size 16"):
        configure(tmp_path, {}, block_size=16)


@pytest.mark.parametrize("option", UNSUPPORTED)
def test_each_unsupported_option_is_named_and_nothing_else(option):
    value, words = UNSUPPORTED[option]
    with pytest.raises(UnsupportedError) as refusal:
        check_engine(make_engine({option: value}), PRESET)
    assert str(refusal.value) == (
        f"KV compression cannot be combined with: {words}. "
        "Drop those options, or serve without --kv-compression-preset."
    )


def test_all_unsupported_options_are_named_at_once_and_each_has_a_test():
    """A row that no test above triggers would be one sentence too many here."""
    changes = {option: value for option, (value, _) in UNSUPPORTED.items()}
    with pytest.raises(UnsupportedError) as refusal:
        check_engine(make_engine(changes), PRESET)
    for _, words in UNSUPPORTED.values():
        assert words in str(refusal.value)
    rows = {text for _, text in refusals._unsupported(make_engine(changes))}
    assert rows == {words for _, words in UNSUPPORTED.values()}


def test_vllm_still_has_every_option_that_is_looked_at():
    """A renamed option would no longer be refused."""
    classes = {
        "cache_config": CacheConfig,
        "parallel_config": ParallelConfig,
        "scheduler_config": SchedulerConfig,
        "model_config": ModelConfig,
        "load_config": LoadConfig,
    }
    for path in SUPPORTED:
        part, _, name = path.rpartition(".")
        owner = classes.get(part, VllmConfig)
        known = name in owner.__dataclass_fields__ or hasattr(owner, name)
        assert known or f"self.{name} = " in inspect.getsource(owner), path
    assert "enable_kv_cache_events" in KVEventsConfig.__dataclass_fields__


def calibrated(**shape) -> Preset:
    values = {"name": "org/Model-1B", "num_layers": 4, "num_kv_heads": 2, "head_dim": 64}
    description, k, v, *_ = CALIBRATED_FORMATS["v-mixed"]
    model = ModelShape(**(values | shape))
    config = PresetConfig(format="v-mixed", description=description, k=k, v=v, model=model)
    return Preset("mine", config)


def test_a_preset_of_the_served_model_is_accepted():
    check_engine(make_engine(), calibrated())


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"num_layers": 5}, r"num_layers 5 \(the model has 4\)"),
        ({"num_kv_heads": 1}, r"num_kv_heads 1 \(the model has 2\)"),
        ({"head_dim": 128}, r"head_dim 128 \(the model has 64\)"),
    ],
)
def test_a_preset_of_another_model_is_refused(shape, words):
    with pytest.raises(PresetMismatch, match=words):
        check_engine(make_engine(), calibrated(**shape))


def test_another_model_on_this_machine_is_refused_before_anything_starts(tmp_path, monkeypatch):
    """Served under the preset's name, which changes nothing; and taken when asked."""
    folder = {"model_config.model": str(tmp_path)}
    with pytest.raises(PresetMismatch, match="'mine' was calibrated for org/Model-1B, and whether"):
        check_engine(make_engine(folder), calibrated())
    logged = []
    monkeypatch.setattr(refusals.logger, "warning", lambda text, *args: logged.append(args))
    options = {"preset": "mine", "allow_other_weights": True}
    engine = make_engine({**folder, "additional_config": {"kv_compression": options}})
    check_engine(engine, calibrated())
    assert "as asked" in logged[0][0]


def test_a_model_that_is_yet_to_be_downloaded_is_checked_in_the_worker():
    """A preset without samples can only ever go by the name, and does so at once."""
    engine = make_engine({"model_config.model": "org/Not-Here"})
    with pytest.raises(PresetMismatch, match="holds no samples"):
        check_engine(engine, calibrated())
    values = {"k": (1.0,) * SAMPLES, "v": (1.0,) * SAMPLES}
    sampled = replace(calibrated(), weights=WeightSamples(layers={0: values}))
    check_engine(engine, sampled)
    with pytest.raises(PresetMismatch, match="not on this machine"):
        refusals.check_weights(engine, sampled)


def test_a_head_dim_that_no_band_fits_is_refused():
    engine = make_engine({"model_config.get_head_size": lambda: 100})
    with pytest.raises(LayoutError, match="head_dim 100"):
        check_engine(engine, PRESET)


# --- the model ------------------------------------------------------------------------------


def test_what_clients_call_a_model_says_nothing_of_its_weights():
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model="/models/a",
            revision="v2",
            served_model_name=["alias"],
            hf_config=SimpleNamespace(_name_or_path="org/a"),
        ),
        load_config=SimpleNamespace(download_dir="/downloads"),
    )
    assert served_model(config) == Served("/models/a", "v2", "/downloads", ("org/a",))


def test_full_attention_layers_of_a_mixed_model():
    kinds = ["sliding_attention", "full_attention", "linear_attention", "full_attention"]
    text = SimpleNamespace(layer_types=kinds)
    assert full_attention_layers(SimpleNamespace(hf_text_config=text)) == [1, 3]
    plain = SimpleNamespace(hf_text_config=SimpleNamespace(), get_total_num_hidden_layers=lambda: 3)
    assert full_attention_layers(plain) == [0, 1, 2]


def vllm_kv_heads(monkeypatch, total: int, rank: int, world: int) -> list[int]:
    """Heads that vLLM's own QKV projection loads on a rank: row h of the weight holds h."""
    for module in (linear, parameter):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: world)
    head = 8
    layer = linear.QKVParallelLinear(8, head, 32, total, bias=False, params_dtype=torch.float32)
    weight = torch.arange(total).repeat_interleave(head)[:, None].expand(-1, 8).float()
    layer.weight_loader(layer.weight, weight.contiguous(), "k")
    first = layer.num_heads * head
    keys = layer.weight.data[first : first + layer.num_kv_heads * head]
    return keys[::head, 0].int().tolist()


@pytest.mark.parametrize(
    ("total", "world"), [(1, 1), (8, 1), (8, 2), (8, 8), (4, 8), (2, 8), (1, 4), (32, 4)]
)
def test_bases_follow_the_kv_heads_of_each_rank(monkeypatch, total, world):
    with set_current_vllm_config(VllmConfig()):
        for rank in range(world):
            loaded = vllm_kv_heads(monkeypatch, total, rank, world)
            assert local_kv_heads(total, rank, world) == loaded
