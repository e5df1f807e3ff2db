"""The kinds of tables: their columns, and the rows that a record makes; see tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm_kvpca.lab import answer_tables as answers
from vllm_kvpca.lab import operation_tables as operation
from vllm_kvpca.lab.cells import change, ratios, stored, thresholds
from vllm_kvpca.lab.codec_tables import CODEC_HEADS, CODEC_TABLES, codec_rows
from vllm_kvpca.lab.engine import STOCK
from vllm_kvpca.lab.record import Record

Rows = Callable[[Record], list[list[str]]]


def _quality(record: Record) -> list[str]:
    results: Any = record.results
    return [
        *stored(record),
        thresholds(record),
        results["dtype"],
        f"{results['archived_share_of_attended_keys']:.0%}",
        change(results),
        f"{results['kl_lower_bound_mean_nats']:.5f}",
        f"{results['top1_agreement']:.2%}",
        f"{results['predicted_tokens']:,}",
    ]


def _identity(record: Record) -> list[str]:
    results: Any = record.results
    rows = results["prompts"]
    gap = results["largest_gap_nats"]
    same = sum(row["identical_tokens"] for row in rows)
    return [
        *stored(record),
        results["dtype"],
        f"{results['identical_prompts']} of {len(rows)}",
        f"{same} of {sum(row['generated_tokens'] for row in rows)}",
        "none parted" if gap is None else f"{gap:.3f}",
    ]


def _capacity(record: Record) -> list[str]:
    results: Any = record.results
    return [
        *stored(record),
        f"{results['tokens_stock']:,}",
        f"{results['tokens']:,}",
        f"{results['ratio']:.2f}x",
        f"{record.settings['kv_gib']:g} GiB",
        f"{record.settings['max_model_len']:,}",
    ]


def _throughput(record: Record) -> list[str]:
    results: Any = record.results
    cells = stored(record)
    for phase in ("prompt", "decode"):
        stock, own = (results[who][f"{phase}_tokens_per_second"] for who in ("stock", "preset"))
        cells += [f"{stock:,.0f}", f"{own:,.0f}", f"{results[f'{phase}_ratio']:.2f}x"]
    return cells


def _load(record: Record) -> list[list[str]]:
    results: Any = record.results
    rows = []
    for server, one in results.items():
        name = "stock" if server == STOCK else f"`{record.settings['preset']}`"
        latency = [f"{one[key]:,.0f}" for key in ("ttft_ms", "ttft_p99_ms", "itl_ms", "itl_p99_ms")]
        speed = f"{one['output_tokens_per_second']:,.1f}"
        rows.append([name, f"{one['completed']}", f"{one['failed']}", speed, *latency])
    return rows


def _metrics_overhead(record: Record) -> list[str]:
    results: Any = record.results
    return [
        f"{record.settings['sequences']}",
        f"{results['counting_us']:.0f}",
        f"{results['publishing_us']:.0f}",
        f"{results['step_ms']:.0f}",
        f"{results['share_of_step']:.3%}",
        f"{results['step_ms_at_half_a_percent']:.1f}",
    ]


def _key_bias_heads(record: Record) -> list[str]:
    return ["K in 8 bits per token", *(f"bias: {name}" for name in _distinct(record, "bias"))]


def _key_bias(record: Record) -> list[list[str]]:
    """A line for each way to store K: KL divergence of the attention weights, nats."""
    return _lines(record, "stored", lambda row: f"{row['kl_nats']:.4f}")


def _calibration(record: Record) -> list[list[str]]:
    """A line for each of K and V: mean over layers, and the range."""
    results: Any = record.results
    lines = []
    for which in ("k", "v"):
        rows = [row for row in results["layers"] if row["tensor"] == which]
        cells = []
        for key in ("channel_gain_db", "coding_gain_db"):
            values = [row[key] for row in rows]
            low, high = min(values), max(values)
            cells.append(f"{sum(values) / len(values):.1f} dB ({low:.1f} to {high:.1f})")
        shares = [row["mean_share"] for row in rows]
        cells.append(f"{sum(shares) / len(shares):.0%} ({min(shares):.0%} to {max(shares):.0%})")
        lines.append([which.upper(), *cells])
    return lines


def _tune(record: Record) -> list[list[str]]:
    """A line for each format that was measured, lowest ratio first."""
    results: Any = record.results
    formats = sorted(results["formats"].items(), key=lambda item: item[1]["total_ratio"])
    return [
        [f"`{name}`", ratios(one), change(one), "chosen" if name == results["chosen"] else ""]
        for name, one in formats
    ]


def _distinct(record: Record, key: str) -> list[str]:
    """What a record's rows have under a key, each once: the columns of its table."""
    results: Any = record.results
    return list(dict.fromkeys(row[key] for row in results["rows"]))


def _lines(record: Record, key: str, cell: Callable[[Any], str]) -> list[list[str]]:
    """A line for each value of a key: the value, then a cell for each row that has it."""
    results: Any = record.results
    lines: dict[str, list[str]] = {}
    for row in results["rows"]:
        lines.setdefault(row[key], []).append(cell(row))
    return [[name, *cells] for name, cells in lines.items()]


def _one(row: Callable[[Record], list[str]]) -> Rows:
    return lambda record: [row(record)]


def _kernel_heads(record: Record) -> list[str]:
    return ["kernel", *(shape.replace("x", " x ") for shape in _distinct(record, "shape"))]


def _kernels(record: Record) -> list[list[str]]:
    """A line for each kernel; microseconds and speed against FlashAttention-3 in bf16."""

    def cell(row: dict[str, Any]) -> str:
        speed = row["against_fa3_bf16"]
        return f"{row['microseconds']:,.0f} us" + ("" if speed is None else f" ({speed:.2f}x)")

    return [[f"`{name}`", *cells] for name, *cells in _lines(record, "contender", cell)]


def _engine(record: Record) -> list[list[str]]:
    """A line for each engine: what fits, then output tokens per second under each load."""
    results: Any = record.results
    rows = []
    for name, found in results["engines"].items():
        against = results["against_stock"][name]
        cells = [f"{found['tokens']:,} ({against['tokens']:.2f}x)"]
        speeds = {load["name"]: load["tokens_per_second"] for load in found["loads"]}
        for load in ("decode", "below compress_after"):
            cells.append(f"{speeds[load]:,.0f} ({against['loads'][load]:.2f}x)")
        for length, milliseconds in found["first_token_milliseconds"].items():
            ratio = against["first_token_time"][length]
            cells.append(f"{milliseconds:,.0f} ms ({ratio:.2f}x)")
        rows.append([f"`{name}`", *cells])
    return rows


def _memory_limited(record: Record) -> list[list[str]]:
    """A line for each engine: what fits, and output tokens per second while requests wait."""
    results: Any = record.results
    rows = []
    for name, found in results["engines"].items():
        ratio = results["against_stock"][name]
        speed = f"{found['tokens_per_second']:,.0f} ({ratio:.2f}x)"
        rows.append([f"`{name}`", f"{found['tokens']:,}", speed])
    return rows


_LOAD_HEADS = [
    "server",
    "requests answered",
    "failed",
    "output tokens/s",
    "first token, median ms",
    "p99",
    "between tokens, median ms",
    "p99",
]
_PRESET = ["preset", "raw / archived bytes of K and V (of V alone)"]
Heads = list[str] | Callable[[Record], list[str]]
TABLES: dict[str, tuple[Heads, Rows]] = {
    "calibration": (
        [
            "mean over layers (range)",
            "coding gain of the channels",
            "coding gain of the PCA basis",
            "energy that is the same for every token",
        ],
        _calibration,
    ),
    "tune": (
        [
            "format",
            "raw / archived bytes of K and V (of V alone)",
            "perplexity change, every token stored (95 % interval)",
            "",
        ],
        _tune,
    ),
    "key-bias": (_key_bias_heads, _key_bias),
    "quality": (
        [
            *_PRESET,
            "compress after / keep recent",
            "dtype",
            "attended keys archived",
            "perplexity change (95 % interval)",
            "KL, lower bound (nats)",
            "same likeliest token",
            "tokens",
        ],
        _one(_quality),
    ),
    "identity": (
        [
            *_PRESET,
            "dtype",
            "identical answers",
            "identical tokens",
            "largest gap at a first difference (nats)",
        ],
        _one(_identity),
    ),
    "capacity": (
        [*_PRESET, "tokens, stock", "tokens", "against stock", "KV memory", "max_model_len"],
        _one(_capacity),
    ),
    "throughput": (
        [
            *_PRESET,
            "prompt tokens/s, stock",
            "prompt tokens/s",
            "against stock",
            "decoded tokens/s, stock",
            "decoded tokens/s",
            "against stock",
        ],
        _one(_throughput),
    ),
    "soak": (operation.SOAK_HEADS, operation.soak),
    "layouts": (operation.LAYOUT_HEADS, operation.layouts),
    "metrics-overhead": (
        [
            "sequences that decode",
            "counting in the scheduler, us",
            "publishing, us",
            "decode step here, ms",
            "share of the step",
            "shortest step of which this is 0.5 %, ms",
        ],
        _one(_metrics_overhead),
    ),
    "load": (_LOAD_HEADS, _load),
    "guidellm": (_LOAD_HEADS, _load),
    "needle": (answers.FACTS_HEADS, answers.facts),
    "recall": (answers.FACTS_HEADS, answers.facts),
    "divergence": (answers.DIVERGENCE_HEADS, answers.divergence),
    "quality-transformers": (answers.TRANSFORMERS_HEADS, answers.transformers),
    "tasks": (answers.TASKS_HEADS, answers.tasks),
    **{name: (CODEC_HEADS, codec_rows(group)) for name, group in CODEC_TABLES.items()},
    "kernels": (_kernel_heads, _kernels),
    "engine": (
        [
            "engine",
            "tokens that fit",
            "decoded tokens/s, 32 x 4,096",
            "decoded tokens/s, below compress_after",
            "first token, 2,048",
            "8,192",
            "32,000",
        ],
        _engine,
    ),
    "memory-limited": (
        ["engine", "tokens that fit", "output tokens/s while requests wait"],
        _memory_limited,
    ),
}
