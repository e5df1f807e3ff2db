"""What a bias of K does to K in 8 bits: records of benchmarks/key_bias.py."""

from __future__ import annotations

from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import Table, columns, lines


def _heads(record: Record) -> list[str]:
    return ["K in 8 bits per token", *(f"bias: {name}" for name in columns(record, "bias"))]


def _rows(record: Record) -> list[list[str]]:
    """A line for each way to store K: KL divergence of the attention weights, nats."""
    return lines(record, "stored", lambda row: f"{row['kl_nats']:.4f}")


TABLES = {"key-bias": Table(_heads, _rows, "python benchmarks/key_bias.py")}
