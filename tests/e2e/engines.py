"""Helpers of the engine tests: one engine per subprocess, so that its memory is given back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from vllm_kvpca.demo_models.catalogue import ModelName
from vllm_kvpca.demo_models.folder import ensure

SCRIPT = Path(__file__).parent / "run_engine.py"
GREEDY = {"temperature": 0, "ignore_eos": True}
UNBOUND = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
"""By default vLLM wants a NUMA node for each rank; unbound ranks must not fight for cores."""
TIE = 0.04
"""Two tokens this close in log-probability count as tied. The logits of SmolLM2 lie between 16
and 32, where neighbouring float16 numbers are 0.0156 apart: each of two logits may round either
way, and the order of sums in attention decides."""


def model() -> str:
    return str(ensure(ModelName.smollm2))


def run(rounds: list[dict[str, Any]], preset: dict[str, Any] | None, **llm: Any) -> dict[str, Any]:
    """Results of one engine (see run_engine); `preset` are its compression options."""
    arguments = {
        "model": model(),
        "dtype": "float16",
        "max_model_len": 4096,
        "max_num_batched_tokens": 512,
        "enforce_eager": True,
        **llm,
    }
    if preset is not None:
        arguments["additional_config"] = {"kv_compression": preset}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        environment = {
            **os.environ,
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "RESULT_FILE": str(result),
            **(UNBOUND if "tensor_parallel_size" in llm else {}),
        }
        process = subprocess.run(
            [sys.executable, str(SCRIPT)],
            input=json.dumps({"llm": arguments, "rounds": rounds}),
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        log = process.stdout + process.stderr
        assert process.returncode == 0, f"the engine failed:\n{log[-6000:]}"
        return {**json.loads(result.read_text()), "log": log}


def assert_same_tokens(wanted: list[dict], got: list[dict]) -> None:
    """Greedy answers agree token by token, up to the first tie of the wanted one."""
    for index, (a, b) in enumerate(zip(wanted, got, strict=True)):
        for at, (x, y) in enumerate(zip(a["tokens"], b["tokens"], strict=True)):
            if x != y:
                assert a["gaps"][at] < TIE, (
                    f"prompt {index}, token {at}: {x} became {y} although it led by "
                    f"{a['gaps'][at]:.3f}"
                )
                break


def archived_tokens(
    result: dict[str, Any], lengths: list[int], generated: int, preset: dict[str, Any]
) -> int:
    """Tokens that prompts of these lengths have archived when each has so many new tokens, the last
    of which is not computed; by the definition of the boundary."""
    (step,) = {size for kind, _, size in result["groups"] if kind == "ArchiveSpec"}
    computed = [length + generated - 1 for length in lengths]
    return sum(
        (n - preset["keep_recent"]) // step * step for n in computed if n > preset["compress_after"]
    )


def text_prompts(lengths: list[int]) -> list[list[int]]:
    """Token ids of real text: the licence that ships with the repository."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model())
    license_text = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = tokenizer(license_text).input_ids
    ids = ids * (1 + (max(lengths) + 1000) // len(ids))
    return [ids[37 * i : 37 * i + n] for i, n in enumerate(lengths)]
