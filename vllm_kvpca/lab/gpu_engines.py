"""Engines on a GPU with random weights, one after the other: what their benches share.

Weights are random (`load_format dummy`): speed and capacity do not depend on them. Each engine
runs in a process of its own; stock with bf16 and with fp8 K and V are measured beside the presets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab import engine, presets, texts
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.peers import PEERS
from vllm_kvpca.lab.record import Record, make_record, model_name
from vllm_kvpca.preset import save_preset
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS

DUMMY: dict[str, Any] = {
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    # Fewer than vLLM's default: a start takes less time, and every engine gets the same.
    "compilation_config": {
        "cudagraph_capture_sizes": [1, 4, 16, 32, 48, 64, 80, 96, 128, 192, 256]
    },
}
Results = dict[str, dict[str, Any]]
"""Of each engine by its name."""


def check(names: Iterable[str], model: str) -> None:
    """Refuse what cannot be measured here, before anything starts.

    Args:
        names: stock, presets, and calibrated formats, which get random bases.

    Raises:
        OptionsError: there is no GPU.
        PresetError: see presets.check.
    """
    if not torch.cuda.is_available():
        raise OptionsError("vllm-kvpca bench measures on an NVIDIA GPU, and there is none here.")
    of_no_model = {STOCK, *PEERS, *CALIBRATED_FORMATS}
    presets.check([name for name in names if name not in of_no_model], model)


@dataclass(frozen=True)
class Load:
    """Requests that arrive at once; each generates `generated` tokens after `prompt` of them."""

    name: str
    requests: int
    prompt: int
    generated: int


@contextmanager
def warm_engine(settings: EngineSettings) -> Iterator[tuple[Any, int]]:
    """An engine that has answered a few requests, and its vocabulary's size."""
    llm = engine.start(settings, in_core=False, **DUMMY)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    try:
        generate(llm, vocabulary, Load("warm-up", 8, 600, 32))
        yield llm, vocabulary
    finally:
        engine.stop(llm)


def tokens_that_fit(llm: Any) -> int:
    return int(llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)


def generate(llm: Any, vocabulary: int, load: Load) -> float:
    """Seconds from the first request to the last answer."""
    from vllm import SamplingParams

    prompts = texts.random_prompts(vocabulary, load.requests, load.prompt, seed=load.prompt)
    params = SamplingParams(
        temperature=0, max_tokens=load.generated, ignore_eos=True, detokenize=False
    )
    begin = time.perf_counter()
    llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return time.perf_counter() - begin


def each_engine(
    settings: EngineSettings,
    names: Sequence[str],
    measure: Callable[[EngineSettings], dict[str, Any]],
) -> Iterator[Results]:
    """What `measure` finds of stock, stock-fp8 and presets: after each engine, all results so far.

    Args:
        names: stock comes first, whatever their order.
    """
    results: Results = {}
    with TemporaryDirectory() as folder:
        every = {name: _settings(settings, name, Path(folder)) for name in (STOCK, *names)}
        for name, chosen in every.items():
            begin = time.monotonic()
            results[name] = measure(chosen)
            print(f"{name}: {time.monotonic() - begin:.0f} s, {results[name]}", flush=True)
            yield results


def _settings(settings: EngineSettings, name: str, folder: Path) -> EngineSettings:
    """Settings of one engine; presets with random bases are written into `folder`."""
    if name not in CALIBRATED_FORMATS:
        return settings.model_copy(update={"preset": name})
    shape = presets.shape_of(settings.model)
    preset = presets.random_preset(name, model_name(settings.model), shape)
    save_preset(folder / name, preset.config, preset.bases, presets.RANDOM_CARD.format(name=name))
    return settings.model_copy(update={"preset": str(folder / name)})


def settings_for(model: str, kv_gib: float, max_model_len: int, seed: int) -> EngineSettings:
    """Settings of a busy server."""
    return EngineSettings(
        model=model,
        max_model_len=max_model_len,
        max_num_seqs=256,
        max_num_batched_tokens=8192,
        kv_gib=kv_gib,
        eager=False,
        seed=seed,
    )


def record_of(kind: str, settings: EngineSettings, results: dict[str, Any]) -> Record:
    """A record of all engines that were measured."""
    chosen = settings.model_dump(exclude={"model", "seed", "preset"})
    return make_record(kind, ["bench"], settings.model, chosen, results, seed=settings.seed)


def records(
    kind: str,
    measure: Callable[[EngineSettings], dict[str, Any]],
    compare: Callable[[Results], dict[str, Any]],
    names: Sequence[str],
    settings: EngineSettings,
) -> Iterator[Record]:
    """A record after each engine, which holds all that were measured so far: a run that is cut
    short leaves one of the others.

    Args:
        names: stock, stock-fp8, presets, or calibrated formats, which get random bases.
    """
    check(names, settings.model)
    for results in each_engine(settings, names, measure):
        yield record_of(kind, settings, compare(results))
