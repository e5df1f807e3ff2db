"""Which platforms are served, and what users of others are told."""

from __future__ import annotations

import pytest
import vllm.platforms
from vllm.platforms.interface import Platform, PlatformEnum

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.serving.platform import device_kind


def platform_of(kind: PlatformEnum, device: str, name: str) -> Platform:
    class Found(Platform):
        _enum = kind
        device_name = name
        device_type = device

    return Found()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_nvidia_gpus_and_processors_are_served(monkeypatch, kind):
    found = platform_of(PlatformEnum[kind.upper()], kind, kind)
    monkeypatch.setattr(vllm.platforms, "current_platform", found)
    assert device_kind() == kind


@pytest.mark.parametrize(("kind", "device"), [("ROCM", "cuda"), ("XPU", "xpu"), ("TPU", "tpu")])
def test_other_platforms_are_refused_by_name(monkeypatch, kind, device):
    """ROCm's devices are called cuda too; they are refused all the same."""
    found = platform_of(PlatformEnum[kind], device, kind.lower())
    monkeypatch.setattr(vllm.platforms, "current_platform", found)
    with pytest.raises(UnsupportedError, match=f"runs on {kind.lower()} here") as refusal:
        device_kind()
    assert "Serve without --kv-compression-preset" in str(refusal.value)
