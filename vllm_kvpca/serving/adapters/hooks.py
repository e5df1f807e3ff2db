"""What vLLM offers hooks for: the attention backend and the cache specs with their managers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from vllm_kvpca.serving.adapters.changes import Misfit, Step

BACKEND_PATH = "vllm_kvpca.serving.step.backend.KvpcaBackend"


@dataclass(frozen=True)
class Backend:
    """Our attention backend under vLLM's name CUSTOM: a name of our own would be unknown to
    spawned processes, which unpickle the configuration before they load plugins."""

    target: str = "vllm.v1.attention.backends.registry:AttentionBackendEnum.CUSTOM"

    def is_made(self) -> bool:
        try:
            backend = _custom()
            return bool(backend.is_overridden() and backend.get_path() == BACKEND_PATH)
        except Exception:  # another vLLM may lack any of it
            return False

    def prepare(self) -> Step:
        try:
            from vllm.v1.attention.backends.registry import register_backend

            custom = _custom()
            taken = custom.is_overridden()
        except Exception as error:
            raise Misfit(f"vLLM's registry of attention backends has changed ({error})") from error
        if taken:
            raise Misfit(f"another plugin has the attention backend CUSTOM ({custom.get_path()})")

        def make() -> None:
            register_backend(custom, BACKEND_PATH)

        return Step(make, custom.clear_override)


def _custom() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum.CUSTOM


@dataclass(frozen=True)
class Specs:
    """The two cache specs and the managers of their blocks."""

    target: str = "vllm.v1.kv_cache_spec_registry:KVCacheSpecRegistry.register"

    def is_made(self) -> bool:
        try:
            from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST as known

            from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
        except Exception:
            return False
        return RecentSpec in known and ArchiveSpec in known

    def prepare(self) -> Step:
        try:
            from vllm.v1.kv_cache_spec_registry import _REGISTRY_KVCACHESPEC_LIST as known
            from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry as registry

            from vllm_kvpca.serving.cache import managers
            from vllm_kvpca.serving.cache.coordinator import PairCoordinator
            from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec

            assert callable(registry.register) and callable(registry._ensure_registered)
        except Exception as error:
            raise Misfit(f"vLLM's cache groups have changed ({error})") from error
        for cls in (managers.RecentManager, managers.ArchiveManager, PairCoordinator):
            check_overrides(cls)

        def undo() -> None:
            for spec in (RecentSpec, ArchiveSpec):
                known.pop(spec, None)

        return Step(managers.register_specs, undo)


def check_overrides(cls: type) -> None:
    """Refuse a vLLM that calls the methods which `cls` overrides in another way than it expects.

    Raises:
        Misfit: a method of vLLM that ours replaces has other parameters.
    """
    own = [base for base in cls.__mro__ if base.__module__.startswith("vllm_kvpca.")]
    theirs = [base for base in cls.__mro__ if base.__module__.startswith("vllm.")]
    for name in {name for base in own for name in vars(base)} - {"__init__"}:
        original = next((vars(base)[name] for base in theirs if name in vars(base)), None)
        if not inspect.isroutine(original):
            continue
        wanted = _parameters(next(vars(base)[name] for base in own if name in vars(base)))
        has = _parameters(original)
        if wanted != has and not _takes_all(wanted, has):
            raise Misfit(
                f"vLLM's {theirs[0].__name__}.{name} takes ({', '.join(has)}), "
                f"not ({', '.join(wanted)})"
            )


def _parameters(method: Any) -> list[str]:
    return [str(p).split(":")[0] for p in _signature(method).parameters.values()]


def _signature(method: Any) -> inspect.Signature:
    return inspect.signature(getattr(method, "__func__", method))


def _takes_all(wanted: list[str], has: list[str]) -> bool:
    """Whether a method ends in *args and **kwargs behind parameters that both have."""
    named = [name for name in wanted if not name.startswith("*")]
    return "*args" in wanted and "**kwargs" in wanted and has[: len(named)] == named


HOOKS = (Backend(), Specs())
