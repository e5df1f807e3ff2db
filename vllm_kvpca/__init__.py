"""A compressed KV cache for vLLM.

Importing this package is cheap: it imports no torch. Public names are loaded on first use.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("vllm-kvpca")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

# Public name -> the module that defines it.
_LAZY = {
    "kv_metrics": "vllm_kvpca.serving.observe.llm",
    "load_preset": "vllm_kvpca.preset",
    "load_preset_cache": "vllm_kvpca.hf_cache",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value  # the next access does not come through here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
