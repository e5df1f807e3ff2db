"""What kind of device vLLM runs on: the one place that says so.

ROCm's torch calls its devices "cuda" too, so neither `device.type` nor `torch.cuda.is_available()`
tells whether our kernels can run. Other platforms are refused when an engine is configured;
after that `device.type` of an engine's tensors says the same as `device_kind`.
"""

from __future__ import annotations

from typing import Literal

from vllm_kvpca.errors import UnsupportedError

DeviceKind = Literal["cpu", "cuda"]


def device_kind() -> DeviceKind:
    """The kind of device that vLLM has found: "cuda" for NVIDIA GPUs, "cpu" for processors.

    Raises:
        UnsupportedError: any other platform (ROCm, XPU, TPU and so on).
    """
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        return "cuda"
    if current_platform.is_cpu():
        return "cpu"
    name = current_platform.device_name or type(current_platform).__name__
    raise UnsupportedError(
        f"KV compression runs on NVIDIA GPUs and on CPUs; vLLM runs on {name} here. "
        "Serve without --kv-compression-preset."
    )
