"""What each way to store K and V costs: one table, teacher-forced, every token stored.

    python benchmarks/codec_study.py --calibration DIR --evaluation DIR [--device cuda] [--only RE]

Runs the model with transformers in float32. K (after RoPE) and V of each full-attention layer are
quantized and restored as soon as they are computed, so every token attends to stored tokens alone.
Prints a line for each option and rewrites the record after each: perplexity against the model
as it is, with a paired bootstrap over windows, KL divergence over the whole vocabulary, how often
the likeliest token is the same, and bytes with scales. Options are in codec_options.py.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from codec_model import Change, Model
from codec_options import OPTIONS, Option
from codec_peers import PEERS
from codec_quantizers import Quantizer, Statistics, parse

from vllm_kvpca.calibration import statistics
from vllm_kvpca.lab import texts
from vllm_kvpca.lab.record import RECORDS, make_record

RAW_BYTES = 2


class Stored:
    """One option on one model: what it does to K and V, and the bytes it takes."""

    def __init__(self, option: Option, model: Model, statistics: dict[str, Statistics]) -> None:
        self.option, self.model = option, model
        layers = model.shape.layers
        edge = {*layers[: option.edges], *layers[len(layers) - option.edges :]}
        self.index = {layer: i for i, layer in enumerate(layers) if layer not in edge}
        self.bands: dict[str, list[list[int]]] = {}
        self.pre, self.bias = (option.k.endswith(word) for word in (" pre", " bias"))
        kind = "pre" if self.pre else "bias" if self.bias else "k"
        self.k, self.k_bytes = self._restore(kind, option.k, statistics)
        self.v, self.v_bytes = self._restore("v", option.v, statistics)

    def _restore(
        self, which: str, spec: str, statistics: dict[str, Statistics]
    ) -> tuple[Callable[[int, torch.Tensor], torch.Tensor] | None, float]:
        size = self.model.shape.head_dim
        if spec == "raw":
            return None, size * RAW_BYTES
        if spec in PEERS:
            function, bytes_of = PEERS[spec]
            return lambda _, x: function(x), bytes_of(size)
        quantizer = Quantizer(parse(spec), statistics[which], self.model.device)
        self.bands["v" if which == "v" else "k"] = [list(band) for band in quantizer.bands]
        return quantizer, quantizer.bytes

    def change(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        index = self.index.get(layer)
        if index is None:
            return k, v
        first = self.option.first
        if self.k and self.pre:
            old, k = k, self.model.rotate(self.k(index, self.model.rotate(k, -1)))
            k[..., :first, :] = old[..., :first, :]
        elif self.bias:
            turned = self.model.turned_bias(layer, k.shape[-2])
            k = self.k(index, k - turned) + turned
        elif self.k:
            k = torch.cat((k[..., :first, :], self.k(index, k[..., first:, :])), -2)
        if self.v:
            v = torch.cat((v[..., :first, :], self.v(index, v[..., first:, :])), -2)
        return k, v

    def ratios(self) -> dict[str, float]:
        """Raw over stored bytes at the window's length, raw layers and first tokens counted."""
        raw = self.model.shape.head_dim * RAW_BYTES
        tokens, layers = self.model.window, len(self.model.shape.layers)
        part = len(self.index) / layers * (tokens - self.option.first) / tokens
        k, v = (part * stored + (1 - part) * raw for stored in (self.k_bytes, self.v_bytes))
        return {
            "k_bytes": self.k_bytes,
            "v_bytes": self.v_bytes,
            "bits_per_element": (k + v) / (2 * self.model.shape.head_dim) * 8,
            "total_ratio": 2 * raw / (k + v),
            "v_ratio": raw / v,
        }


class Reference:
    """The unchanged model's answers to the evaluation windows."""

    def __init__(self, model: Model, windows: list[list[int]], seed: int) -> None:
        self.model, self.windows, self.seed = model, windows, seed
        # Hidden states are small; log-probabilities over the vocabulary are made of them anew.
        self.hidden = [hidden.cpu() for hidden in model.hidden(windows, None)]
        pairs = zip(self.hidden, windows, strict=True)
        self.target = np.stack([self._target(model.logprobs(h), w) for h, w in pairs])

    def _target(self, logprobs: torch.Tensor, window: list[int]) -> np.ndarray:
        ids = torch.tensor(window[1:], device=logprobs.device)[:, None]
        return logprobs.gather(1, ids)[:, 0].double().cpu().numpy()

    def compare(self, change: Change) -> dict[str, Any]:
        target, kl, same = [], 0.0, 0.0
        changed = self.model.hidden(self.windows, change)
        for before, after, window in zip(self.hidden, changed, self.windows, strict=True):
            p, q = self.model.logprobs(before), self.model.logprobs(after)
            target.append(self._target(q, window))
            same += (p.argmax(-1) == q.argmax(-1)).float().mean().item()
            kl += q.sub_(p).mul_(p.exp_()).sum(-1).double().mean().item()
        other = np.stack(target)
        low, high = statistics.bootstrap_change(self.target, other, self.seed)
        return {
            "perplexity_change": statistics.perplexity_change(self.target, other),
            "perplexity_change_ci95": [low, high],
            "kl_mean_nats": -kl / len(self.windows),
            "top1_agreement": same / len(self.windows),
        }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub name; by default the demo model")
    parser.add_argument("--calibration", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--evaluation", type=Path, required=True, help="folder of .txt files")
    parser.add_argument("--tokens", type=int, default=40_960, help="to evaluate on")
    parser.add_argument("--calibration-tokens", type=int, default=61_440)
    parser.add_argument(
        "--calibration-context",
        type=int,
        default=0,
        help="positions over which windows of calibration begin; 0: all at the first",
    )
    parser.add_argument("--window", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument(
        "--offset", type=int, default=0, help="position of a window's first token in evaluation"
    )
    parser.add_argument("--batch", type=int, default=4, help="windows at a time")
    parser.add_argument("--only", default="", help="regular expression; options it is found in")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--slug", default="", help="tells this record from others of the model")
    parser.add_argument("--output", type=Path, default=RECORDS, help="folder of the record")
    return parser.parse_args()


def main() -> None:
    chosen = arguments()
    if chosen.model is None:
        from vllm_kvpca.demo_models.catalogue import ModelName
        from vllm_kvpca.demo_models.folder import ensure

        chosen.model = str(ensure(ModelName.smollm2))
    started = time.perf_counter()
    torch.backends.cuda.matmul.allow_tf32 = False
    model = Model(chosen.model, chosen.device, chosen.window, chosen.batch, chosen.offset)
    calibration = texts.find_texts([chosen.calibration])
    spread = chosen.calibration_tokens, chosen.calibration_context
    collected = model.statistics(calibration, *spread)
    model.evaluate_far()
    files = texts.find_texts([chosen.evaluation])
    count = max(1, chosen.tokens // chosen.window)
    windows = texts.windows(model.tokenizer, files, count, chosen.window)
    reference = Reference(model, windows, chosen.seed)
    stock = statistics.perplexity(reference.target)
    print(f"{time.perf_counter() - started:.0f} s; perplexity {stock:.4f}, {count} windows")
    rows: list[dict[str, Any]] = []
    for option in OPTIONS:
        if not re.search(chosen.only, f"{option.group}: {option.name}"):
            continue
        rows.append(measure(option, model, collected, reference))
        write(chosen, model, files, windows, stock, rows)
        print(line(rows[-1]), f"{time.perf_counter() - started:.0f} s", flush=True)


def measure(
    option: Option, model: Model, statistics: dict[str, Statistics], reference: Reference
) -> dict[str, Any]:
    stored = Stored(option, model, statistics)
    about = {"group": option.group, "name": option.name, "k": option.k, "v": option.v}
    left = {"first_tokens_raw": option.first, "edge_layers_raw": option.edges}
    found = reference.compare(stored.change)
    return about | left | {"bands": stored.bands} | stored.ratios() | found


def line(row: dict[str, Any]) -> str:
    low, high = row["perplexity_change_ci95"]
    return (
        f"{row['group']:9} {row['name']:45} {row['bits_per_element']:5.2f} bits "
        f"{row['total_ratio']:5.2f}x (V {row['v_ratio']:4.2f}x)  PPL "
        f"{row['perplexity_change']:+9.3%} ({low:+.2%} to {high:+.2%})  "
        f"KL {row['kl_mean_nats']:.5f}  top-1 {row['top1_agreement']:.2%}"
    )


def write(
    chosen: argparse.Namespace,
    model: Model,
    files: list[Path],
    windows: list[list[int]],
    stock: float,
    rows: list[dict[str, Any]],
) -> None:
    settings = {
        "windows": len(windows),
        "window_tokens": chosen.window,
        "predicted_tokens": len(windows) * (chosen.window - 1),
        "calibration_tokens": chosen.calibration_tokens,
        "dtype": "float32",
        "layers": len(model.shape.layers),
        "head_dim": model.shape.head_dim,
        "offset": chosen.offset,
        "calibration_context": chosen.calibration_context,
        "only": chosen.only,
    }
    results = {"perplexity_stock": stock, "rows": rows}
    record = make_record(
        "codec-study", [chosen.slug], chosen.model, settings, results, files, chosen.seed
    )
    words = ["python", "benchmarks/codec_study.py", *sys.argv[1:]]
    command = shlex.join(words).replace(str(Path.home()), "~")
    record.model_copy(update={"command": command}).write(chosen.output)


if __name__ == "__main__":
    main()
