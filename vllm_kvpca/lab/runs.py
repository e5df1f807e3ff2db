"""Whole measurements: stock against presets on the same input, a record for each comparison."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vllm_kvpca.lab import texts
from vllm_kvpca.lab.against_stock import (
    ENGINE,
    Done,
    Thresholds,
    nothing_done,
    overlaps,
    record_of,
)
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.measurements import block_life as block_life_
from vllm_kvpca.lab.measurements import capacity as capacity_
from vllm_kvpca.lab.measurements import identity as identity_
from vllm_kvpca.lab.measurements import quality as quality_
from vllm_kvpca.lab.measurements import throughput as load_
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.teacher_forced import settings_for


def quality(
    model: str,
    preset_names: Sequence[str],
    text: Sequence[Path],
    tokens: int = 20_480,
    window: int = 2048,
    chunk: int = 64,
    thresholds: Sequence[Thresholds] = ((0, 0), (512, 256)),
    through: str = ENGINE,
    seed: int = 0,
    done: Done = nothing_done,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "quality": one for each preset and pair of thresholds.

    Args:
        tokens, window: tokens in all and per window; tokens // window windows are read.
        chunk: tokens of each window per step.
        through: "engine"; or "transformers" for load_preset_cache, which gives records of kind
            "quality-transformers" with the whole KL divergence.
        done: what to leave out; see comparison.finished.
        more: further EngineSettings.
    """
    files = texts.find_texts(text)
    seen = overlaps(preset_names, files)
    windows = texts.windows(texts.tokenizer_of(model), files, max(1, tokens // window), window)
    every = [
        settings_for(model, windows, chunk, name, pair, seed=seed, **more)
        for name in preset_names
        for pair in thresholds
    ]
    todo = [settings for settings in every if not done(settings)]
    if not todo:
        return
    chosen = {"windows": len(windows), "window_tokens": window}
    kl = f"over stock's {quality_.TOP} likeliest tokens and one bucket for the rest: "
    for settings, results in zip(todo, _qualities(todo, windows, through, seed), strict=True):
        used = chosen | {
            "kl": kl + "a lower bound of the full KL",
            "calibration_overlap": seen[settings.preset],
        }
        kind = "quality" if through == ENGINE else f"quality-{through}"
        yield record_of(kind, settings, results, used, files, results["dtype"])


def _qualities(
    todo: Sequence[EngineSettings], windows: Sequence[Sequence[int]], through: str, seed: int
) -> Iterator[dict[str, Any]]:
    if through != ENGINE:
        # Imported late: it loads transformers' models, which no engine needs.
        from vllm_kvpca.lab.through_transformers import compare_quality

        yield from compare_quality(todo, windows, todo[0].chunk or 1, seed)
        return
    stock = quality_.score(todo[0].model_copy(update={"preset": STOCK}), windows)
    for settings in todo:
        yield quality_.compare(stock, quality_.score(settings, windows), seed)


def identity(
    model: str,
    preset_names: Sequence[str],
    text: Sequence[Path],
    dtypes: Sequence[str] = ("bfloat16", "float16"),
    generated: int = 64,
    seed: int = 0,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "identity": one for each dtype and preset, and a control for each dtype.

    The control is stock against stock with steps of half as many tokens: how often answers part
    for no other reason than the order of summation.
    """
    files = texts.find_texts(text)
    lengths = identity_.PROMPT_TOKENS
    longest = max(lengths)
    windows = texts.windows(texts.tokenizer_of(model), files, len(lengths), longest)
    prompts = [window[:length] for window, length in zip(windows, lengths, strict=True)]
    for dtype in dtypes:
        common = EngineSettings(
            model=model, dtype=dtype, max_model_len=longest + generated, seed=seed, **more
        )
        stock, resolved = identity_.answer(common, prompts, generated)
        control: dict[str, Any] = {"max_num_batched_tokens": common.max_num_batched_tokens // 2}
        for changes in [control, *({"preset": name} for name in preset_names)]:
            settings = common.model_copy(update=changes)
            other, _ = identity_.answer(settings, prompts, generated)
            results = identity_.compare(stock, other, lengths) | {"dtype": resolved}
            yield record_of("identity", settings, results, {}, files, resolved)


def capacity(
    model: str,
    preset_names: Sequence[str],
    kv_gib: float = 1,
    max_model_len: int = 8192,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "capacity": one for each preset."""
    common = EngineSettings(model=model, max_model_len=max_model_len, kv_gib=kv_gib, **more)
    stock = capacity_.measure(common)
    for name in preset_names:
        settings = common.model_copy(update={"preset": name})
        results = capacity_.compare(stock, capacity_.measure(settings))
        yield record_of("capacity", settings, results, {})


def throughput(
    model: str,
    preset_names: Sequence[str],
    requests: int = 16,
    prompt_tokens: int = 1000,
    generated: int = 128,
    repeats: int = 3,
    seed: int = 0,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "throughput": one for each preset."""
    prompts = load_.random_prompts(_vocabulary(model), requests, prompt_tokens, seed)
    common = EngineSettings(model=model, max_num_seqs=requests, seed=seed, **more)

    def speeds(settings: EngineSettings) -> dict[str, Any]:
        times = load_.measure(settings, prompts, generated, repeats)
        return load_.speeds(times, requests, prompt_tokens, generated)

    stock = speeds(common)
    chosen = {
        "requests": requests,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated,
        "repeats": repeats,
    }
    for name in preset_names:
        settings = common.model_copy(update={"preset": name})
        results = load_.compare(stock, speeds(settings))
        yield record_of("throughput", settings, results, chosen)


def block_life(
    model: str,
    preset_names: Sequence[str],
    prompt_tokens: int = 3000,
    generated: int = 200,
    seed: int = 0,
    **more: Any,
) -> Iterator[Record]:
    """Records of kind "block-life": one for each preset."""
    [prompt] = load_.random_prompts(_vocabulary(model), 1, prompt_tokens, seed)
    common = EngineSettings(model=model, seed=seed, **more)
    stock = block_life_.measure(common, prompt, generated)
    chosen = {"prompt_tokens": prompt_tokens, "generated_tokens": generated}
    for name in preset_names:
        settings = common.model_copy(update={"preset": name})
        results = block_life_.compare(stock, block_life_.measure(settings, prompt, generated))
        yield record_of("block-life", settings, results, chosen)


def _vocabulary(model: str) -> int:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model).get_text_config().vocab_size
