"""KV memory over the life of one long request: the blocks of both cache groups after every step,
and what a stock engine holds for the same tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from vllm_kvpca.lab import engine, presets, texts
from vllm_kvpca.lab.against_stock import record_of
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.progress import steps
from vllm_kvpca.lab.record import Record


def run(
    model: str,
    preset_names: Sequence[str],
    prompt_tokens: int = 3000,
    generated: int = 200,
    seed: int = 0,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "block-life": one for each preset."""
    presets.check(preset_names, model)
    [prompt] = texts.random_prompts(texts.vocabulary(model), 1, prompt_tokens, seed)
    common = EngineSettings(model=model, seed=seed, **more)
    stock = measure(common, prompt, generated)
    chosen = {"prompt_tokens": prompt_tokens, "generated_tokens": generated}
    for name in preset_names:
        settings = common.model_copy(update={"preset": name})
        results = compare(stock, measure(settings, prompt, generated))
        yield record_of("block-life", settings, results, chosen)


def measure(settings: EngineSettings, prompt: Sequence[int], generated: int) -> dict[str, Any]:
    """Run one request in a process of its own and count blocks after every step.

    Returns:
        computed_tokens: after each step, the last entry None: the request has ended.
        raw_blocks, archive_blocks: in use after each step (a stock engine has only raw ones).
        block_bytes: bytes of one block over all layers.
    """
    return engine.in_process(_measure, settings, prompt, generated)


def _measure(settings: EngineSettings, prompt: Sequence[int], generated: int) -> dict[str, Any]:
    llm = engine.start(settings)
    from vllm import SamplingParams

    scheduler = engine.scheduler(llm)
    computed: list[int | None] = []
    counts: list[tuple[int, int]] = []
    total = -(-len(prompt) // settings.max_num_batched_tokens) + generated - 1
    params = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True)
    with steps(settings.preset, total) as step:

        def after_step() -> None:
            step()
            request = next(iter(scheduler.requests.values()), None)
            computed.append(request.num_computed_tokens if request else None)
            counts.append(_counts(scheduler))

        engine.run(llm, [prompt], params, after_step=after_step)
    raw, archive = zip(*counts, strict=True)
    return {
        "computed_tokens": computed,
        "raw_blocks": list(raw),
        "archive_blocks": list(archive),
        "block_bytes": engine.block_bytes(llm),
        "group_block_tokens": [
            group.kv_cache_spec.block_size for group in scheduler.kv_cache_config.kv_cache_groups
        ],
    }


def _counts(scheduler: Any) -> tuple[int, int]:
    """Blocks in use: raw, archive. Their sum is what the pool has given out.

    Raises:
        RuntimeError: the managers and the pool disagree.
    """
    from vllm_kvpca.serving.cache.managers import ArchiveManager

    coordinator = scheduler.kv_cache_manager.coordinator
    pool = coordinator.block_pool
    used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # block 0 is never given out
    archive = 0
    for manager in coordinator.single_type_managers:
        if isinstance(manager, ArchiveManager):
            archive += len(manager.held)
    held = [len(m.held) for m in coordinator.single_type_managers if hasattr(m, "held")]
    if held and len(held) == len(coordinator.single_type_managers) and sum(held) != used:
        raise RuntimeError(f"the cache groups hold {held} blocks, the pool has given out {used}.")
    return used - archive, archive


def compare(stock: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The results of a record: both lives, and their peaks and ends in MiB."""
    return {
        "stock": stock,
        "preset": other,
        "peak_mib_stock": max(mib(stock)),
        "peak_mib": max(mib(other)),
        # The last sample lies after the end of the request.
        "final_mib_stock": mib(stock)[-2],
        "final_mib": mib(other)[-2],
        "blocks_left_after_end": other["raw_blocks"][-1] + other["archive_blocks"][-1],
    }


def mib(life: dict[str, Any], part: str | None = None) -> list[float]:
    """MiB in use after each step: of "raw" or "archive" blocks, or of both."""
    parts = [f"{part}_blocks"] if part else ["raw_blocks", "archive_blocks"]
    counts = zip(*(life[name] for name in parts), strict=True)
    return [sum(row) * life["block_bytes"] / 2**20 for row in counts]
