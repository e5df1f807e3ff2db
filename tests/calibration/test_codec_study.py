"""benchmarks/codec_study.py from its command line to its record, on a tiny model with a K bias."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from vllm_kvpca.lab.record import load_all

ROOT = Path(__file__).parents[2]


def biased(folder: Path, tokenizer: Any) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rope_theta=1e6,
    )
    model = Qwen2ForCausalLM(config)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias.data.view(2, 32)[:, 15] = 200
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_the_bias_is_measured_near_and_far(tmp_path: Path, tokenizer: Any, words: str):
    folder = biased(tmp_path / "Tiny-Qwen2", tokenizer)
    for name in ("calibration", "evaluation"):
        (tmp_path / name).mkdir()
        text = "".join(f"{name} {i}: {words}" for i in range(60))
        (tmp_path / name / "text.txt").write_text(text)
    command = [sys.executable, ROOT / "benchmarks" / "codec_study.py", "--model", folder]
    command += ["--calibration", tmp_path / "calibration", "--evaluation", tmp_path / "evaluation"]
    command += ["--tokens", 256, "--calibration-tokens", 512, "--window", 64, "--batch", 2]
    command += ["--only", "K (identity|hadamard) 1:8( mean| bias)?$", "--device", "cpu"]
    command += ["--calibration-context", 4096, "--offset", 3000, "--output", tmp_path / "records"]
    words_of_it = [str(word) for word in command]
    done = subprocess.run(words_of_it, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = load_all(tmp_path / "records", "codec-study")
    assert (record.settings["offset"], record.settings["calibration_context"]) == (3000, 4096)
    loss = {
        row["name"]: row["kl_mean_nats"]
        for row in record.results["rows"]
        if row["group"] == "key bias"
    }
    for basis in ("identity", "hadamard"):
        assert loss[f"K {basis} 1:8 bias"] < loss[f"K {basis} 1:8"] / 2
