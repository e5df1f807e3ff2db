"""Other compressed KV caches of vLLM, measured in place of a preset: `--preset stock-fp8`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A `--kv-cache-dtype` of vLLM.

    Attributes:
        kv_cache_dtype: vLLM's name for it.
        k_bytes, v_bytes: of a head of so many dimensions and one token, scales included; read off
            vLLM 0.32's sources.
    """

    kv_cache_dtype: str
    k_bytes: Callable[[int], int]
    v_bytes: Callable[[int], int]


def _int8(size: int) -> int:
    return size


def _int8_and_scale(size: int) -> int:
    return size + 4


def _int4_and_norm(size: int) -> int:
    return size // 2 + 2


def _int4_and_range(size: int) -> int:
    return size // 2 + 4


_KNOWN = (
    Peer("fp8", _int8, _int8),
    Peer("int8_per_token_head", _int8_and_scale, _int8_and_scale),
    Peer("turboquant_k8v4", _int8, _int4_and_range),
    Peer("turboquant_4bit_nc", _int4_and_norm, _int4_and_range),
)
PEERS = {f"stock-{peer.kv_cache_dtype}": peer for peer in _KNOWN}
"""By the name that stands in place of a preset's."""


def ratios(name: str, head_dim: int) -> tuple[float, float]:
    """Raw bytes (two a number) over stored bytes: of K and V together, and of V alone."""
    peer = PEERS[name]
    k, v = peer.k_bytes(head_dim), peer.v_bytes(head_dim)
    return 4 * head_dim / (k + v), 2 * head_dim / v
