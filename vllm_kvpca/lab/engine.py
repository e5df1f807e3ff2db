"""One engine per process: start it, feed it token ids, count what its scheduler does.

An engine never gives all of its memory back, so each measurement of each engine runs in a
process of its own (`in_process`). Inside, vLLM's engine core runs in that same process
(VLLM_ENABLE_V1_MULTIPROCESSING=0): requests can then be handed over together, so that their
chunks move in step, and the scheduler can be watched.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel, ConfigDict

from vllm_kvpca.lab.peers import PEERS

STOCK = "stock"
"""In place of a preset: vLLM without compression."""

P = ParamSpec("P")
R = TypeVar("R")


class EngineSettings(BaseModel):
    """How an engine is started.

    Attributes:
        preset: see preset.load_preset, or STOCK, or one of peers.PEERS.
        compress_after, keep_recent: tokens; of no effect in a stock engine or a peer.
        dtype, kv_cache_dtype: "auto" is the model's own. A peer brings its kv_cache_dtype.
        max_num_batched_tokens: tokens per step, over all requests.
        chunk: tokens per request and step, None for no limit of its own.
        kv_gib: memory of the KV cache, GiB.
        eager: skip torch.compile and CUDA graphs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    preset: str = STOCK
    compress_after: int = 512
    keep_recent: int = 256
    dtype: str = "auto"
    kv_cache_dtype: str = "auto"
    max_model_len: int
    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    chunk: int | None = None
    kv_gib: float = 2
    eager: bool = True
    seed: int = 0


def in_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call a function of a module in a fresh process and return its result.

    Arguments and result are pickled. An exception is raised here again.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()


def start(settings: EngineSettings, in_core: bool = True, **more: Any) -> Any:
    """A vLLM `LLM`. Call it in a fresh process only.

    Args:
        in_core: run the engine core in this process (see the module's docstring); False is
            how vLLM runs by default, which is what throughput must be measured with.
        more: further arguments of LLM.
    """
    prepare_environment(in_core)
    from vllm import LLM

    return LLM(**(arguments(settings) | more))


def prepare_environment(in_core: bool) -> None:
    """Set what vLLM reads from the environment; before its first import."""
    if in_core:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would overrule kv_cache_memory_bytes


def arguments(settings: EngineSettings) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`."""
    compression: dict[str, Any] = {}
    peer = PEERS.get(settings.preset)
    if settings.preset != STOCK and not peer:
        compression["additional_config"] = {
            "kv_compression": {
                "preset": settings.preset,
                "compress_after": settings.compress_after,
                "keep_recent": settings.keep_recent,
            }
        }
    return compression | {
        "model": settings.model,
        "dtype": settings.dtype,
        "kv_cache_dtype": peer.kv_cache_dtype if peer else settings.kv_cache_dtype,
        "kv_cache_memory_bytes": int(settings.kv_gib * 2**30),
        # Beside that, vLLM only asks whether so much of a GPU is free: others may be at work there.
        "gpu_memory_utilization": 0.05,
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "long_prefill_token_threshold": settings.chunk or 0,
        "enable_prefix_caching": False,  # every run computes its prompts anew
        "enforce_eager": settings.eager,
        "seed": settings.seed,
    }


def stop(llm: Any) -> None:
    """End the processes of an engine started without `in_core`; else ours would wait for them."""
    llm.llm_engine.engine_core.shutdown()


def scheduler(llm: Any) -> Any:
    """The scheduler of an engine started with `in_core`."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def policy(llm: Any) -> Any:
    """`pages.boundary.Policy` that the engine follows, with the step of its boundary; None in a
    stock engine."""
    for group in scheduler(llm).kv_cache_config.kv_cache_groups:
        if hasattr(group.kv_cache_spec, "policy"):
            return group.kv_cache_spec.policy
    return None


def block_bytes(llm: Any) -> int:
    """Bytes of one block of the pool over all layers of a group; groups share the pool's memory,
    so they all take the same, and the tensors that vLLM lists for each group overlap."""
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    return max(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in groups)


def watch_chunks(llm: Any) -> dict[str, list[int]]:
    """Record from now on how many tokens of each request every step computes.

    Returns:
        A dictionary that fills up: index of the request as text, to its chunks in order.
    """
    chunks: dict[str, list[int]] = {}
    owner = scheduler(llm)
    schedule = owner.schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        output = schedule(*args, **kwargs)
        for request_id, count in output.num_scheduled_tokens.items():
            # vLLM appends a random suffix to the ids it is given.
            chunks.setdefault(request_id.partition("-")[0], []).append(count)
        return output

    owner.schedule = watched
    return chunks


def run(
    llm: Any,
    prompts: Sequence[Sequence[int]],
    params: Any,
    after_step: Callable[[], None] = lambda: None,
    after_answer: Callable[[], None] = lambda: None,
) -> list[Any]:
    """Hand over all prompts, then step until all are answered.

    Args:
        prompts: token ids. Request i has the id str(i).
        params: SamplingParams of all of them.
        after_step, after_answer: called after every step of the engine, and for every prompt
            that it has answered.

    Returns:
        A finished RequestOutput for each prompt.
    """
    engine = llm.llm_engine
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), {"prompt_token_ids": list(prompt)}, params)
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                done[output.request_id] = output
                after_answer()
        after_step()
    return [done[str(index)] for index in range(len(prompts))]
