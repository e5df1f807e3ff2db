"""vLLM's CPU platform answers CPU_ATTN whatever was selected; let our backend through."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.serving.adapters.changes import Patch, Wrap
from vllm_kvpca.serving.adapters.hooks import Backend


def _get_attn_backend_cls(original: Any) -> Any:
    def wrapper(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kw: Any
    ) -> Any:
        if getattr(selected_backend, "name", None) != "CUSTOM" or not Backend().is_made():
            return original(cls, selected_backend, attn_selector_config, *args, **kw)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=None, **attn_selector_config._asdict()
        )
        if reasons:
            raise UnsupportedError(
                f"KV compression does not support this model: {', '.join(reasons)}. "
                "Serve it without --kv-compression-preset."
            )
        return selected_backend.get_path()

    return wrapper


PATCH = Patch(
    title="CPU platform",
    why="The CPU platform ignores which backend was selected.",
    how="`get_attn_backend_cls` answers our backend where it was selected, after the checks that "
    "vLLM's other platforms make.",
    waits_for="`CpuPlatform.get_attn_backend_cls` to honour a registered backend",
    fails="A refusal that names what the backend does not support.",
    changes=(
        Wrap(
            "vllm.platforms.cpu:CpuPlatform.get_attn_backend_cls",
            _get_attn_backend_cls,
            ("cls", "selected_backend", "attn_selector_config"),
        ),
    ),
)
