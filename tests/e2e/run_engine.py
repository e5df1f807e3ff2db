"""Run one vLLM engine in a process of its own: a job as JSON on stdin, results in a file.

The job: {"llm": {...LLM arguments}, "rounds": [{"prompts": [[token ids]], "sampling": {...},
"lora": folder or null, "sleep": level before it}]}. Every round is one `LLM.generate` call.
"""

from __future__ import annotations

import json
import os
import sys

from prometheus_client import REGISTRY
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def completion(output) -> dict:
    answer = output.outputs[0]
    logprobs = [
        sorted((entry.logprob for entry in step.values()), reverse=True) for step in answer.logprobs
    ]
    prompt = [
        None if step is None else step[token].logprob
        for step, token in zip(output.prompt_logprobs or [], output.prompt_token_ids, strict=False)
    ]
    return {
        "tokens": list(answer.token_ids),
        "gaps": [top[0] - top[1] for top in logprobs],
        "cached": output.num_cached_tokens,
        "prompt_logprobs": prompt,
    }


def kvpca_samples() -> dict[str, float]:
    """kvpca_* series of this process by name and labels (without model and engine)."""
    samples = {}
    for family in REGISTRY.collect():
        for sample in family.samples:
            if sample.name.startswith("kvpca_"):
                state = sample.labels.get("state")
                samples[f"{sample.name}/{state}" if state else sample.name] = sample.value
    return samples


def nap(llm: LLM, level: int) -> None:
    """Sleep and wake up as vLLM's documentation says for level 2."""
    llm.sleep(level=level)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])


def main() -> None:
    job = json.load(sys.stdin)
    llm = LLM(disable_log_stats=False, **job["llm"])
    rounds = []
    for spec in job["rounds"]:
        if spec.get("sleep"):
            nap(llm, spec["sleep"])
        lora = LoRARequest("adapter", 1, spec["lora"]) if spec.get("lora") else None
        outputs = llm.generate(
            [{"prompt_token_ids": ids} for ids in spec["prompts"]],
            SamplingParams(logprobs=2, **spec["sampling"]),
            lora_request=lora,
            use_tqdm=False,
        )
        rounds.append([completion(output) for output in outputs])
    counters = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    result = {
        "rounds": rounds,
        "preemptions": counters["vllm:num_preemptions"],
        "metrics": kvpca_samples(),
        "free_blocks": pool.get_num_free_blocks(),
        "usable_blocks": pool.num_gpu_blocks - 1,
        "capacity": llm.llm_engine.vllm_config.cache_config.num_gpu_blocks,
        "groups": [
            [type(g.kv_cache_spec).__name__, len(g.layer_names), g.kv_cache_spec.block_size]
            for g in scheduler.kv_cache_config.kv_cache_groups
        ],
    }
    with open(os.environ["RESULT_FILE"], "w") as file:
        json.dump(result, file)


if __name__ == "__main__":
    main()
