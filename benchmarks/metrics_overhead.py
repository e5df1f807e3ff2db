"""What the metrics cost: time spent on them per decode step, measured inside a real engine.

    python benchmarks/metrics_overhead.py [--sequences 64] [--layers N]

Times both halves, counting in the scheduler and publishing in the stat logger, while so many
sequences decode, and writes a record. On a CPU a step is slow, and the model's arithmetic drives
everything else out of the processor's caches, which a GPU's host is spared: with `--layers 1` a
random model of one narrow layer decodes.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2"}
PROMPT, DECODED = 400, 40


def timed(spent: list[float], function: Callable[..., Any]) -> Callable[..., Any]:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - started)

    return wrapper


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def narrow_model(layers: int, folder: str) -> str:
    """A folder with the configuration of a random Llama; weights are made up at load."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    return folder


def main(sequences: int, layers: int | None) -> None:
    import torch
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

    from vllm_kvpca.demo_models.catalogue import ModelName
    from vllm_kvpca.demo_models.folder import ensure
    from vllm_kvpca.lab.record import make_record
    from vllm_kvpca.serving.observe import stats as cache_stats
    from vllm_kvpca.serving.observe.stat_logger import KvpcaStatLogger

    counting: list[float] = []
    publishing: list[float] = []
    steps: list[float] = []
    cache_stats.take_stats = timed(counting, cache_stats.take_stats)
    KvpcaStatLogger.record = timed(publishing, KvpcaStatLogger.record)  # type: ignore[method-assign]
    LLMEngine.step = timed(steps, LLMEngine.step)  # type: ignore[method-assign]
    dummy: dict[str, Any] = {}
    if layers is None:
        model = str(ensure(ModelName.smollm2))
    else:
        model = narrow_model(layers, f"{tempfile.mkdtemp()}/{layers}-narrow-layer-model")
        dummy = {"load_format": "dummy", "skip_tokenizer_init": True}
    llm = LLM(
        model,
        **dummy,
        max_model_len=2048,
        max_num_seqs=sequences,
        enforce_eager=not torch.cuda.is_available(),
        disable_log_stats=False,
        additional_config={
            "kv_compression": {"preset": "k8v4", "compress_after": 256, "keep_recent": 128}
        },
    )
    prompts = [{"prompt_token_ids": [1000 + n] * PROMPT} for n in range(sequences)]
    answers = {"max_tokens": DECODED, "ignore_eos": True, "detokenize": layers is None}
    llm.generate(prompts, SamplingParams(**answers))
    decode = slice(-DECODED // 2, -1)  # the last steps, in which every sequence decodes
    own = median(counting[decode]) + median(publishing[decode])
    step = median(steps[decode])
    results = {
        "counting_us": median(counting[decode]) * 1e6,
        "publishing_us": median(publishing[decode]) * 1e6,
        "step_ms": step * 1e3,
        "share_of_step": own / step,
        "step_ms_at_half_a_percent": own / 0.005 * 1e3,
    }
    print(results)
    settings = {"sequences": sequences, "prompt_tokens": PROMPT, "preset": "k8v4"}
    record = make_record("metrics-overhead", [f"{sequences}"], model, settings, results)
    command = f"python benchmarks/metrics_overhead.py --sequences {sequences}"
    if layers is not None:
        command += f" --layers {layers}"
    print(record.model_copy(update={"command": command}).write())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--layers", type=int)
    chosen = parser.parse_args()
    main(chosen.sequences, chosen.layers)
