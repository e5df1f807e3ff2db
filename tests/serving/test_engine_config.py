"""What happens to an engine's configuration that asks for compression, before vLLM sees it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import vllm.platforms
from vllm.platforms.interface import Platform, PlatformEnum
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.preset import FORMATS, save_preset
from vllm_kvpca.serving.adapters import engine_config
from vllm_kvpca.serving.adapters.hooks import BACKEND_PATH
from vllm_kvpca.serving.log import logger
from vllm_kvpca.serving.settings.options import cached_preset


def engine_args(preset: str, model: str = "a-model") -> SimpleNamespace:
    """The fields of EngineArgs that are read."""
    return SimpleNamespace(
        model=model,
        served_model_name=None,
        hf_config_path=None,
        download_dir=None,
        trust_remote_code=False,
        revision=None,
        code_revision=None,
        config_format="auto",
        attention_config=SimpleNamespace(backend_per_kind={}),
        additional_config={"kv_compression": {"preset": preset}},
    )


def configure(args):
    """As vLLM calls it; the original must not be reached where something is refused."""

    def original(self):
        raise AssertionError("vLLM's own method was called")

    return engine_config._create_engine_config(original)(args)


@pytest.fixture
def backend():
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)
    yield
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND_PATH)


@pytest.mark.parametrize("kind", ["ROCM", "XPU"])
def test_other_platforms_are_refused_before_anything_starts(monkeypatch, backend, kind):
    class Found(Platform):
        _enum = PlatformEnum[kind]
        device_name = kind.lower()
        device_type = "cuda" if kind == "ROCM" else "xpu"

    monkeypatch.setattr(vllm.platforms, "current_platform", Found())
    with pytest.raises(UnsupportedError, match=f"vLLM runs on {kind.lower()} here"):
        configure(engine_args("k8v4"))


def test_a_backend_that_another_plugin_took_afterwards_is_named(backend):
    register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
    with pytest.raises(UnsupportedError, match=r"another\.plugin\.Backend") as refusal:
        configure(engine_args("k8v4"))
    assert "VLLM_PLUGINS=kvpca" in str(refusal.value)


def test_auto_says_so_where_the_model_s_configuration_cannot_be_read(tmp_path, backend):
    """A preset chosen by name alone may be the wrong one for the model's shape or bias."""
    (tmp_path / "config.json").write_text("{ this is no JSON")
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    try:
        with pytest.raises(AssertionError, match="own method"):
            configure(engine_args("auto", model=str(tmp_path)))
    finally:
        logger.removeHandler(handler)
    [line] = [line for line in lines if "cannot be read" in line]
    assert str(tmp_path) in line
    assert "Name a preset" in line


def test_a_later_engine_gets_the_preset_that_is_in_the_folder_now(tmp_path, backend):
    """Layers share one loaded preset, but not with engines made before it was written anew."""
    for name in ("k8v4", "k8v8"):
        save_preset(tmp_path, FORMATS[name], {}, "card")
        with pytest.raises(AssertionError, match="own method"):
            configure(engine_args(str(tmp_path)))
        assert cached_preset(str(tmp_path)).config.format == name
