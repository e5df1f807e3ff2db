"""What of a model is compressed, looked at when vLLM has grouped its layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from vllm.v1.kv_cache_interface import KVCacheGroupSpec, KVCacheSpec, MambaSpec

from vllm_kvpca.errors import OptionsError, UnsupportedError
from vllm_kvpca.serving.cache.pairs import find_pairs
from vllm_kvpca.serving.cache.specs import ArchiveSpec, RecentSpec
from vllm_kvpca.serving.log import logger
from vllm_kvpca.serving.settings.options import CompressionOptions

LARGE_STEP = 1024
"""Tokens: an archive step worth a warning."""


def check_specs(workers: Sequence[dict[str, KVCacheSpec]]) -> None:
    """Refuse a model in which nothing would be compressed.

    Args:
        workers: of each worker, its layers' cache specs by name.

    Raises:
        UnsupportedError: saying what its layers are.
    """
    specs = {name: spec for worker in workers for name, spec in worker.items()}
    if any(isinstance(spec, ArchiveSpec) for spec in specs.values()):
        return
    kinds = Counter(_kind(spec) for spec in specs.values())
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none with a KV cache"
    raise UnsupportedError(
        "KV compression would compress nothing of this model: it has no plain full-attention "
        f"layer (layers: {found}). Serve it without --kv-compression-preset."
    )


def _kind(spec: KVCacheSpec) -> str:
    return type(spec).__name__.removesuffix("Spec")


@contextmanager
def explained(vllm_config: Any) -> Iterator[None]:
    """vLLM's refusal of a pool that is too small, with the option that made it so small.

    Raises:
        OptionsError: vLLM's message and the option, where the user has set the number of blocks.
    """
    override = vllm_config.cache_config.num_gpu_blocks_override
    try:
        yield
    except ValueError as error:
        if override is None or "max seq len" not in str(error):
            raise  # of another cause
        raise OptionsError(
            f"{error} --num-gpu-blocks-override {override} leaves {override - 1} KV cache blocks: "
            "raise it or drop it, or lower --max-model-len."
        ) from error


def log_coverage(vllm_config: Any, groups: Sequence[KVCacheGroupSpec]) -> None:
    """Say which layers are compressed and which are left to vLLM, and in what steps.

    Raises:
        UnsupportedError: groups that do not come in pairs.
    """
    find_pairs(groups)
    kinds: Counter[str] = Counter({"compressed full attention": 0})
    archives: dict[ArchiveSpec, None] = {}
    for group in groups:
        spec = group.kv_cache_spec
        if isinstance(spec, ArchiveSpec):
            kinds["compressed full attention"] += len(group.layer_names)
            archives[spec] = None
        elif not isinstance(spec, RecentSpec):
            kinds[f"left to vLLM: {_kind(spec)}"] += len(group.layer_names)
    options = CompressionOptions.of(vllm_config)
    assert options is not None
    stored = "; ".join(dict.fromkeys(map(_stored, archives)))
    logger.info(
        "KV compression: preset %s, layers: %s; %s; sequences over %d tokens keep the last %d raw.",
        options.preset,
        ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        stored,
        options.compress_after,
        options.keep_recent,
    )
    longest = vllm_config.model_config.max_model_len
    mamba = any(isinstance(group.kv_cache_spec, MambaSpec) for group in groups)
    for spec in archives:
        _warn_of_large_steps(spec, longest, mamba)


def _stored(spec: ArchiveSpec) -> str:
    raw, archived = spec.plan.raw_token_bytes, spec.state_content_size_bytes
    return (
        f"archived token {archived} bytes per head against {raw} raw (total ratio "
        f"{raw / archived:.2f}x), in steps of {spec.policy.align}"
    )


def _warn_of_large_steps(spec: ArchiveSpec, max_model_len: int, mamba: bool) -> None:
    step = spec.policy.align
    why = " because pages have to be as large as this model's Mamba states" if mamba else ""
    if not spec.policy.boundary(max_model_len):
        logger.warning(
            "KV compression has no effect here: no sequence of up to %d tokens (--max-model-len) "
            "is archived, as the archive is filled in steps of %d tokens%s.",
            max_model_len,
            step,
            why,
        )
    elif step >= LARGE_STEP:
        logger.warning(
            "KV compression archives in steps of %d tokens%s: sequences keep up to %d tokens raw.",
            step,
            why,
            spec.policy.keep_recent + step,
        )
