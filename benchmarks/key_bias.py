"""What 8 bits per token do to keys with a large bias, as Qwen2 and Qwen2.5 have them.

Their k_proj adds a bias of up to 414 to a few channels, where other channels have a standard
deviation near 2. One scale per token then rounds those others away. No weights are needed to see
it: keys are drawn, biased, rotated by RoPE and stored by the product's codec; what is reported is
how far the attention of random queries moves.

    python benchmarks/key_bias.py
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from vllm_kvpca.codec.bands import decode_bands, encode_bands
from vllm_kvpca.codec.basis import hadamard_basis, identity_basis
from vllm_kvpca.lab.record import RECORDS, make_record
from vllm_kvpca.preset.schema import BandSpec, TensorFormat

MODEL = Path(__file__).parent / "models" / "Qwen2.5-7B-shaped"
HEAD_DIM, THETA = 128, 1e6
TOKENS, QUERIES, SEED = 8192, 64, 0
KEY_STD, LOGIT_STD, BIAS = 2.0, 2.0, 400.0
PAIRS = {"none": (), "one slow pair": (62,), "slow pairs": (58, 62), "a fast pair": (4,)}
"""RoPE pairs (channels i and i + 64) that have the bias; pair 0 turns fastest."""


def keys(pairs: tuple[int, ...]) -> torch.Tensor:
    """(tokens, head_dim) float32 after RoPE."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(TOKENS, HEAD_DIM, generator=generator) * KEY_STD
    half = HEAD_DIM // 2
    for pair in pairs:
        x[:, pair] += BIAS
        x[:, pair + half] -= BIAS / 2
    angle = torch.arange(TOKENS)[:, None] * THETA ** (-torch.arange(half) / half)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return x * cos + torch.cat([-x[:, half:], x[:, :half]], -1) * sin


def stored(k: torch.Tensor, basis: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """What is left of keys after 8 bits per component and one scale per token."""
    bands = TensorFormat(basis="identity", bands=(BandSpec(share=1, bits=8),)).resolve(HEAD_DIM)
    codes = encode_bands((k - mean) @ basis, bands)
    return decode_bands(*codes, bands, raw_dtype=torch.float32) @ basis.T + mean


def fp8(k: torch.Tensor) -> torch.Tensor:
    """vLLM's fp8 cache with scale 1."""
    return k.to(torch.float8_e4m3fn).float()


def attention_change(k: torch.Tensor, kept: torch.Tensor) -> dict[str, float]:
    """KL divergence of the attention weights (mean over queries, nats), and the part of the
    logits' error that differs between tokens (nats; a common shift changes no weight)."""
    generator = torch.Generator().manual_seed(SEED + 1)
    scale = LOGIT_STD / (KEY_STD * math.sqrt(HEAD_DIM))
    q = torch.randn(QUERIES, HEAD_DIM, generator=generator).double() * scale
    exact, other = q @ k.double().T, q @ kept.double().T
    kl = torch.nn.functional.kl_div(
        other.log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return {"kl_nats": float(kl), "logit_error_nats": float((other - exact).std(-1).mean())}


def main() -> None:
    identity, hadamard = identity_basis(HEAD_DIM), hadamard_basis(HEAD_DIM)
    rows: list[dict[str, Any]] = []
    for name, pairs in PAIRS.items():
        k = keys(pairs)
        mean, none = k.mean(0), torch.zeros(HEAD_DIM)
        options = {
            "int8": stored(k, identity, none),
            "int8, Hadamard": stored(k, hadamard, none),
            "int8, fixed mean removed": stored(k, identity, mean),
            "int8, Hadamard, fixed mean removed": stored(k, hadamard, mean),
            "fp8 e4m3": fp8(k),
        }
        rows += [
            {"bias": name, "stored": option, **attention_change(k, kept)}
            for option, kept in options.items()
        ]
    for row in rows:
        print(f"{row['bias']:14} {row['stored']:36} KL {row['kl_nats']:.5f} nats")
    settings = {
        "head_dim": HEAD_DIM,
        "rope_theta": THETA,
        "tokens": TOKENS,
        "queries": QUERIES,
        "key_std": KEY_STD,
        "logit_std_nats": LOGIT_STD,
        "bias": BIAS,
    }
    record = make_record("key-bias", [], str(MODEL), settings, {"rows": rows}, seed=SEED)
    command = {"command": "python benchmarks/key_bias.py"}
    print(record.model_copy(update=command).write(RECORDS))


if __name__ == "__main__":
    main()
