"""The codecs that codec_study.py measures: name, K, V, and what is left raw.

K and V are specs of codec_quantizers.py, names of codec_peers.py, or "raw".
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Option:
    """One codec.

    Attributes:
        first: tokens at the start of a sequence that stay raw.
        edges: layers at either end of the model that stay raw.
    """

    group: str
    name: str
    k: str = "raw"
    v: str = "raw"
    first: int = 0
    edges: int = 0


V8_4 = "3/8:8 5/8:4"
K5 = "1/4:8 3/4:4"
K7 = "3/4:8 1/4:4"
CUT = "7/8:4 1/8:0"
H4 = "hadamard 1:4"

V_ALONE = (
    "identity 1:8",
    "hadamard 1:8",
    f"hadamard {V8_4}",
    f"pca {V8_4}",
    f"pca+mix {V8_4}",
    f"weighted {V8_4}",
    f"weighted+mix {V8_4}",
    f"joint+mix {V8_4}",
    f"balanced+mix {V8_4}",
    f"weighted+mix {V8_4} search",
    "weighted+mix 1/4:8 3/4:4",
    "pca 3/4:8 1/4:0",
    "pca 3/4:8 1/4:0 mean",
    "identity 1:4",
    H4,
    "pca 1:4",
    "weighted+mix 1:4",
    "balanced+mix 1:4",
    "balanced+mix 1:4 search",
    "weighted+mix 1/4:4 3/4:4",
    f"weighted+mix {CUT}",
    f"{H4} mean",
    f"{H4} search",
    f"{H4} gain",
    f"{H4} gauss",
    f"{H4} laplace",
    f"{H4} fitted",
    "hadamard 1:3",
    "hadamard 1:3 search",
    "hadamard 1:3 gauss",
    "balanced+mix 1:3 gauss",
    "hadamard 1:2 gauss",
    "weighted+mix waterfill=34",
)
K_ALONE = (
    "identity 1:8",
    "hadamard 1:8",
    "channel 1:8",
    "balanced+mix 1:8",
    "identity 1:8 mean",
    "identity 1:4",
    H4,
    f"{H4} mean",
    f"{H4} search",
    f"{H4} gauss",
    f"{H4} pre",
    "pca 1:4",
    "channel 1:4",
    "channel 1:4 mean",
    "balanced+mix 1:4",
    "balanced+mix 1:4 mean",
    "balanced+mix 1:4 search",
    "balanced+mix 1:4 gauss",
    "balanced+mix 1:4 pre",
    f"weighted+mix {K7}",
    f"joint+mix {K7}",
    f"balanced+mix {K7}",
    f"pca+mix {K5}",
    f"weighted {K5}",
    f"weighted+mix {K5}",
    f"weighted+mix {K5} mean",
    f"weighted+mix {K5} pre",
    f"joint+mix {K5}",
    f"balanced+mix {K5}",
    f"balanced+mix {K5} mean",
    "weighted+mix 1/8:8 7/8:4",
    "balanced+mix 1/8:8 7/8:4",
    "weighted+mix 1/4:4 3/4:4",
    "balanced+mix 1/4:4 3/4:4",
    f"weighted+mix {CUT}",
    f"weighted+mix {CUT} mean",
    f"joint+mix {CUT}",
    f"balanced+mix {CUT}",
    f"balanced+mix {CUT} mean",
    f"balanced+mix {CUT} pre",
    "balanced+mix 1/8:8 1/2:4 3/8:0",
    "balanced+mix 1/4:4 3/4:3",
    "balanced+mix 1/4:4 3/4:3 gauss",
    "balanced+mix 1:3 gauss",
    "balanced+mix 1:3 gauss pre",
    "weighted+mix waterfill=30",
    "balanced+mix waterfill=30",
)


def _pair(name: str, k: str, v: str = H4, first: int = 0) -> Option:
    return Option("together", name, k, v, first)


TOGETHER = (
    _pair("k8v8", "identity 1:8", "identity 1:8"),
    _pair("k8v8, Hadamard", "hadamard 1:8", "hadamard 1:8"),
    _pair("k8v4", "identity 1:8"),
    _pair("k8v4, K Hadamard", "hadamard 1:8"),
    _pair("k8v4 search", "identity 1:8", f"{H4} search"),
    _pair("k7v4", f"weighted+mix {K7}"),
    _pair("k7v4 balanced", f"balanced+mix {K7}"),
    _pair("k7v4 balanced search", f"balanced+mix {K7} search", f"{H4} search"),
    _pair("k5v4", f"weighted+mix {K5}"),
    _pair("k5v4 mean", f"weighted+mix {K5} mean"),
    _pair("k5v4 balanced", f"balanced+mix {K5}"),
    _pair("k5v4 balanced search", f"balanced+mix {K5} search", f"{H4} search"),
    _pair("k5v4 balanced gauss", f"balanced+mix {K5} gauss", f"{H4} gauss"),
    _pair("k5v4 balanced, first 4 raw", f"balanced+mix {K5}", first=4),
    _pair("k4v4, one band", "balanced+mix 1:4"),
    _pair("k4v4, one band, mean", "balanced+mix 1:4 mean"),
    _pair("k4v4, one band, search", "balanced+mix 1:4 search", f"{H4} search"),
    _pair("k4v4, one band, before RoPE", "balanced+mix 1:4 pre"),
    _pair("k4v4, one band, before RoPE, search", "balanced+mix 1:4 search pre", f"{H4} search"),
    _pair("k4v4 Hadamard", H4),
    _pair("k4v4 weighted, cut", f"weighted+mix {CUT}"),
    _pair("k4v4 cut", f"balanced+mix {CUT}"),
    _pair("k4v4 cut, mean", f"balanced+mix {CUT} mean"),
    _pair("k4v4 cut, search", f"balanced+mix {CUT} search", f"{H4} search"),
    _pair("k4v4 cut, search, first 4 raw", f"balanced+mix {CUT} search", f"{H4} search", first=4),
    _pair("k4v4 cut, gauss", f"balanced+mix {CUT} gauss", f"{H4} gauss"),
    _pair("k4v4 cut, before RoPE", f"balanced+mix {CUT} pre"),
    _pair("k4v4 cut, search, before RoPE", f"balanced+mix {CUT} search pre", f"{H4} search"),
    _pair("k4v4 cut, gauss, before RoPE", f"balanced+mix {CUT} gauss pre", f"{H4} gauss"),
    _pair(
        "k4v4 cut, search, mean, before RoPE, first 4 raw",
        f"balanced+mix {CUT} search mean pre",
        f"{H4} search",
        first=4,
    ),
    _pair("k4v4, 4 and 3 bits", "balanced+mix 3/8:4 5/8:3"),
    _pair("k4v4, 4 and 3 bits, search", "balanced+mix 3/8:4 5/8:3 search", f"{H4} search"),
    _pair("k4v4, 4 and 3 bits, gauss", "balanced+mix 3/8:4 5/8:3 gauss", f"{H4} gauss"),
    _pair("k4v4, 4 and 3, gauss, pre", "balanced+mix 3/8:4 5/8:3 gauss pre", f"{H4} gauss"),
    _pair("k5v3", f"balanced+mix {K5}", "hadamard 1:3"),
    _pair("k5v3 gauss", f"balanced+mix {K5} gauss", "hadamard 1:3 gauss"),
    _pair("k4v3 gauss", "balanced+mix 1/8:8 3/4:4 1/8:0 gauss", "hadamard 1:3 gauss"),
    _pair("k4v3, one band, gauss", "balanced+mix 1:4 gauss", "hadamard 1:3 gauss"),
    _pair("k6v4 balanced", "balanced+mix 1/8:8 7/8:4"),
    _pair("k6v4 balanced, search", "balanced+mix 1/8:8 7/8:4 search", f"{H4} search"),
)
S = "signed"
V36 = "pca+mix 1/4:4 3/4:4"
SIGNED = (
    *(
        Option("signed", f"V {spec}", v=spec)
        for spec in (
            f"{H4} {S}",
            f"{H4} signed-search",
            f"{H4} clip=2.6",
            f"pca+mix {V8_4} {S}",
            f"joint+mix {V8_4} {S}",
            f"pca+mix {K5} {S}",
            f"{V36} {S}",
            f"weighted+mix 1/4:4 3/4:4 {S}",
            f"hadamard 1/2:4 1/2:4 {S}",
            f"hadamard 1:3 {S}",
        )
    ),
    *(
        Option("signed", name, k, v)
        for name, k, v in (
            ("k8v4 signed", "identity 1:8", f"{H4} {S}"),
            ("k8v4 signed, K Hadamard", "hadamard 1:8", f"{H4} {S}"),
            ("k7v4 signed", f"weighted+mix {K7} {S}", f"{H4} {S}"),
            ("96 B: K 60, V 36", f"weighted+mix {K7} {S}", f"{V36} {S}"),
            ("96 B: K 52, V 44", f"weighted+mix 1/2:8 1/2:4 {S}", f"pca+mix {K5} {S}"),
            ("96 B: K 48, V 48", f"weighted+mix {V8_4} {S}", f"pca+mix {V8_4} {S}"),
            ("84 B: K 48, V 36", f"weighted+mix {V8_4} {S}", f"{V36} {S}"),
            ("84 B: K 44, V 40", f"weighted+mix {K5} {S}", f"pca+mix 1/8:8 7/8:4 {S}"),
            ("82 B: K 48, V 34", f"weighted+mix {V8_4} {S}", f"{H4} {S}"),
            ("82 B: K 48 joint, V 34", f"joint+mix {V8_4} {S}", f"{H4} {S}"),
            ("k5v4 signed", f"weighted+mix {K5} {S}", f"{H4} {S}"),
            ("k5v4 signed, balanced", f"balanced+mix {K5} {S}", f"{H4} {S}"),
            ("k4v4, one band, signed", f"balanced+mix 1:4 {S}", f"{H4} {S}"),
            ("k4v4, one band, before RoPE, signed", f"balanced+mix 1:4 {S} pre", f"{H4} {S}"),
            ("k4v4 cut, signed", f"balanced+mix {CUT} {S}", f"{H4} {S}"),
            ("k4v4, 4 and 3 bits, signed", f"balanced+mix 3/8:4 5/8:3 {S}", f"{H4} {S}"),
        )
    ),
    Option(
        "signed",
        "k4v4 cut, mean, before RoPE, first 4 raw, signed",
        f"balanced+mix {CUT} {S} mean pre",
        f"{H4} {S}",
        first=4,
    ),
    Option("signed", "k8v4, first 4 raw, signed", "identity 1:8", f"{H4} {S}", first=4),
)
WITHOUT_BIAS = tuple(
    Option("key bias", f"K {spec}", spec)
    for base in (
        "identity 1:8",
        "hadamard 1:8",
        "balanced+mix 1:8",
        f"weighted+mix {V8_4} {S}",
        f"balanced+mix {V8_4} {S}",
        f"weighted+mix {K5} {S}",
        f"balanced+mix {K5} {S}",
        f"balanced+mix 1:4 {S}",
        f"{H4} {S}",
    )
    for spec in (base, f"{base} mean", f"{base} bias")
)
"""For models whose K has a bias: as it is, without its mean, and without the bias."""
PEERS = (
    Option("peers", "vLLM fp8", "fp8", "fp8"),
    Option("peers", "vLLM fp8, K alone", "fp8"),
    Option("peers", "vLLM int8_per_token_head", "int8-token-head", "int8-token-head"),
    Option("peers", "vLLM turboquant_k8v4", "fp8", "turboquant-v4", edges=2),
    Option("peers", "vLLM turboquant_k8v4, all layers", "fp8", "turboquant-v4"),
    Option("peers", "vLLM turboquant_4bit_nc", "turboquant-k4", "turboquant-v4", edges=2),
    Option("peers", "vLLM turboquant_4bit_nc, all layers", "turboquant-k4", "turboquant-v4"),
)
OPTIONS: tuple[Option, ...] = (
    *TOGETHER,
    *PEERS,
    *WITHOUT_BIAS,
    *SIGNED,
    *(Option("V alone", f"V {spec}", v=spec) for spec in V_ALONE),
    Option("V alone", f"V {H4}, first 4 raw", v=H4, first=4),
    *(Option("K alone", f"K {spec}", k=spec) for spec in K_ALONE),
    Option("K alone", f"K balanced+mix {CUT}, first 4 raw", k=f"balanced+mix {CUT}", first=4),
)
