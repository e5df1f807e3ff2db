"""What a layer is planned as: heads, block sizes, identity; and what is said of coarse steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig
from vllm.model_executor.layers.attention import ChunkedLocalAttention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import KVCacheGroupSpec, MambaSpec

from vllm_kvpca.errors import PresetMismatch, UnsupportedError
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.block_sizes import BlockSizes
from vllm_kvpca.pages.layer_plan import LayerPlan
from vllm_kvpca.preset import load_preset
from vllm_kvpca.serving.cache import coverage
from vllm_kvpca.serving.cache.pairs import ARCHIVE_SUFFIX
from vllm_kvpca.serving.observe.llm import kv_metrics
from vllm_kvpca.serving.observe.times import ArchiveTimer
from vllm_kvpca.serving.settings.options import CompressionOptions
from vllm_kvpca.serving.step import attach
from vllm_kvpca.serving.step.archive_layer import ArchiveLayer, CompressedImpl

from .shadow import make_specs

CALIBRATED = "HuggingFaceTB--SmolLM2-135M-Instruct/k5v4"
OPTIONS = CompressionOptions(preset="k8v4")


def layer(kv_heads: int, head_size: int) -> SimpleNamespace:
    return SimpleNamespace(num_kv_heads=kv_heads, head_size=head_size, impl=CompressedImpl())


def engine(*layers: SimpleNamespace, heads: int = 3, head_size: int = 64) -> SimpleNamespace:
    """A configuration of an engine with these layers, in a model that says it has such heads."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            get_total_num_kv_heads=lambda: heads, get_head_size=lambda: head_size
        ),
        cache_config=SimpleNamespace(user_specified_block_size=False, block_size=16),
        compilation_config=SimpleNamespace(static_forward_context=dict(enumerate(layers))),
    )


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    monkeypatch.setattr(attach, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(attach, "get_tensor_model_parallel_world_size", lambda: 1)


def heads_of(preset: str, one: SimpleNamespace) -> list[int]:
    return attach._heads(load_preset(preset), "layer.4", one, engine(one))


def test_bases_are_as_many_as_the_layer_s_own_heads():
    """Some models have layers with other heads than their configuration's."""
    assert heads_of("k8v4", layer(3, 64)) == [0, 1, 2]
    assert heads_of("k8v4", layer(2, 64)) == [0, 1]
    assert heads_of("k8v4", layer(4, 128)) == [0, 1, 2, 3]
    assert heads_of(CALIBRATED, layer(3, 64)) == [0, 1, 2]


@pytest.mark.parametrize("other", [layer(2, 64), layer(3, 128)])
def test_fitted_bases_for_another_shape_are_refused(other):
    with pytest.raises(
        PresetMismatch, match=r"layer\.4 has .* calibration-free format \(raw, k8v8"
    ):
        heads_of(CALIBRATED, other)


def planned(config: SimpleNamespace, one: SimpleNamespace) -> LayerPlan:
    preset = load_preset("k8v4")
    blocks = attach.block_sizes(config, OPTIONS, preset, one)
    assert isinstance(blocks, BlockSizes)
    streams = preset.streams(one.head_size)
    return LayerPlan(streams, torch.bfloat16, blocks.raw_block, blocks.archive_block, 512, 256)


def test_pages_of_two_shapes_divide_each_other():
    """vLLM then gives the smaller layers larger blocks, and pads nothing."""
    small, large = layer(2, 64), layer(2, 128)
    config = engine(small, large)
    plans = planned(config, small), planned(config, large)
    assert plans[0].raw_block == plans[1].raw_block
    assert plans[0].scaled(2).head_page_bytes == plans[1].head_page_bytes
    used = [plan.archive.head_bytes / plan.head_page_bytes for plan in plans]
    assert min(used) > 0.9


def test_shapes_that_do_not_divide_are_said_to_cost_memory(caplog):
    attach._warn_of_padding.cache_clear()
    small, large = layer(2, 64), layer(3, 64)
    with caplog.at_level("WARNING", "vllm.kvpca"):
        for one in (small, large, small):
            planned(engine(small, large), one)
    assert [record.message for record in caplog.records] == [
        "Compressed layers of this model have 128 and 192 values of K per token, which do not "
        "divide each other: vLLM pads the pages of the smaller layers, and less memory is saved."
    ]


def test_chunks_of_local_attention_hold_whole_blocks():
    """vLLM gives chunked layers blocks as large as ours and refuses to run if a chunk ends inside
    one."""
    chunked = ChunkedLocalAttention.__new__(ChunkedLocalAttention)
    torch.nn.Module.__init__(chunked)
    chunked.attention_chunk_size, chunked.impl = 8192, None
    ours, preset = layer(8, 128), load_preset("k8v8")
    options = CompressionOptions(preset="k8v8", compress_after=256, keep_recent=128)
    free, fitting = (
        attach.block_sizes(engine(ours, other), options, preset, ours).raw_block
        for other in (OtherLayer(), chunked)
    )
    assert 8192 % free, "any choice would do"
    assert 8192 % fitting == 0


class PlainAttention(torch.nn.Module):
    """What of vLLM's Attention is looked at."""

    num_heads, num_kv_heads, head_size, head_size_v = 6, 3, 64, 64
    kv_cache_torch_dtype = torch.bfloat16

    def __init__(self) -> None:
        super().__init__()
        self.impl = CompressedImpl()


class OtherLayer(AttentionLayerBase):
    get_attn_backend = get_kv_cache_spec = None


@pytest.mark.parametrize("final", [128, 528])
def test_blocks_are_chosen_by_vllm_s_final_block_size(monkeypatch, final):
    """It is known once all layers are loaded: what the platform prefers, and beside Mamba layers
    the number of tokens whose page holds a state. Pages that do not divide it would be padded."""
    monkeypatch.setattr(attach, "Attention", PlainAttention)
    monkeypatch.setattr(attach, "check_weights", lambda *args: None)
    monkeypatch.setattr(attach, "model_digest", lambda config: "")
    config, ours = engine(), PlainAttention()
    config.additional_config = {"kv_compression": {"preset": "k8v4"}}
    config.max_concurrent_batches = 2
    context = config.compilation_config.static_forward_context
    context |= {"model.layers.0.attn": ours, "model.layers.1.attn": OtherLayer()}
    archive = attach.attach_archive(ours.impl, config)
    config.cache_config.block_size = final
    recent, archived = ours.get_kv_cache_spec(config), archive.get_kv_cache_spec(config)
    assert recent.block_size == final
    assert recent.page_size_bytes == archived.page_size_bytes
    content = archived.plan.archive.head_bytes / archived.plan.head_page_bytes
    assert content > 0.97


def test_a_model_s_digest_is_the_same_whoever_reads_it():
    first, second = LlamaConfig(num_hidden_layers=3), LlamaConfig(num_hidden_layers=3)
    second.transformers_version, second._name_or_path = "4.0.0", "/another/copy"
    assert attach.config_digest(first) == attach.config_digest(second)
    assert attach.config_digest(first) != attach.config_digest(LlamaConfig(num_hidden_layers=4))


def mamba_groups(scale: int) -> list[KVCacheGroupSpec]:
    """One pair with pages enlarged to a Mamba state's, beside that state."""
    recent, archive = make_specs(BlockSizes(32, 80), 512, 256)
    grown = [spec.copy_with_new_block_size(spec.block_size * scale) for spec in (recent, archive)]
    state = MambaSpec(block_size=16, shapes=((8,),), dtypes=(torch.bfloat16,))
    names = ["layer.0", "layer.0" + ARCHIVE_SUFFIX, "layer.1"]
    specs = [*grown, state]
    return [KVCacheGroupSpec([name], spec) for name, spec in zip(names, specs, strict=True)]


@pytest.mark.parametrize(
    "scale, longest, said",
    [
        (16, 8192, "archives in steps of 1280 tokens because pages have to be as large as"),
        (16, 1024, "has no effect here: no sequence of up to 1024 tokens"),
        (1, 8192, None),
    ],
)
def test_large_steps_beside_mamba_layers_are_said(caplog, scale, longest, said):
    config = SimpleNamespace(
        additional_config={"kv_compression": {"preset": "k8v4"}},
        model_config=SimpleNamespace(max_model_len=longest),
    )
    with caplog.at_level("WARNING", "vllm.kvpca"):
        coverage.log_coverage(config, mamba_groups(scale))
    messages = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert len(messages) == (said is not None)
    assert said is None or said in messages[0]


def test_only_a_small_pool_is_blamed_on_the_number_of_blocks():
    config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks_override=20))
    with pytest.raises(ValueError, match=r"^some other fault$"), coverage.explained(config):
        raise ValueError("some other fault")
    text = "To serve at least one request with the model's max seq len (512), 1 GiB is needed."
    with (
        pytest.raises(ValueError, match="--num-gpu-blocks-override 20 leaves 19"),
        coverage.explained(config),
    ):
        raise ValueError(text)


def test_figures_of_an_asynchronous_engine_are_refused_with_the_way_out():
    options = {"kv_compression": {"preset": "k8v4"}}
    engine_client = SimpleNamespace(
        engine_core=SimpleNamespace(call_utility_async=None),
        vllm_config=SimpleNamespace(additional_config=options),
    )
    with pytest.raises(UnsupportedError, match="a server answers GET /kv_compression"):
        kv_metrics(engine_client)


def test_layers_of_a_shape_share_an_engine_s_workspace():
    """And no other engine's, whose chunks a captured graph may still use."""
    pytest.importorskip("triton")
    from vllm_kvpca.serving.step.workspace import workspace_for

    config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        model_config=SimpleNamespace(max_model_len=64),
    )
    _, spec = make_specs(BlockSizes(32, 80), 256, 128)
    cpu, engines = torch.device("cpu"), []
    for _ in range(2):
        context: dict[str, ArchiveLayer] = {}
        for name, heads in (("a", 3), ("b", 3), ("c", 6)):
            impl = CompressedImpl()
            impl.num_heads, impl.num_kv_heads, impl.head_size = heads, 1, 8
            impl.vllm_config = config
            archive = ArchiveLayer(
                lambda: spec,
                LayerCodec(spec.plan.archive, None, None, torch.bfloat16),
                (heads, 1, 8),
                ArchiveTimer(),
            )
            archive.workspace = workspace_for(
                context, impl, torch.bfloat16, cpu, print, key_bias=False
            )
            context[name] = archive
        engines.append([layer.workspace for layer in context.values()])
    for a, b, c in engines:
        assert a is b and a is not c
    assert not {id(one) for one in engines[0]} & {id(one) for one in engines[1]}
