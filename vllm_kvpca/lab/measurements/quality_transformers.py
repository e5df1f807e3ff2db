"""Quality without vLLM: transformers with `load_preset_cache` against its own cache, with whole
distributions. The table puts the same measurement through the engine beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vllm_kvpca.calibration import statistics
from vllm_kvpca.lab.against_stock import TRANSFORMERS
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.measurements.quality import TOP
from vllm_kvpca.lab.progress import steps
from vllm_kvpca.lab.record import Record
from vllm_kvpca.lab.table import (
    PRESET_HEADS,
    THRESHOLDS_HEAD,
    Table,
    after_and_recent,
    change,
    stored,
)
from vllm_kvpca.lab.teacher_forced import archived_share


def measure(
    settings: Sequence[EngineSettings],
    windows: Sequence[Sequence[int]],
    chunk: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Results of quality records, one for each of `settings`, which share a model.

    The KL divergence is over the whole vocabulary. The lower bound is taken as through the
    engine, so that both can be compared.
    """
    # Imported late: it loads transformers' models, which no table needs.
    from vllm_kvpca.lab import through_transformers as reader

    network = reader.load(settings[0].model, settings[0].dtype)
    makers = [reader.cache_maker(one) for one in (reader.stock_of(settings[0]), *settings)]
    shape = (len(makers), len(windows), len(windows[0]) - 1)
    target, full, bound, same = (np.zeros(shape) for _ in range(4))
    ids = torch.tensor(windows, device=network.device)
    total = -(-len(windows) // reader.ROWS) * -(-len(windows[0]) // chunk)
    with steps(TRANSFORMERS, total) as step:
        for rows, positions, parts in reader.read(network, makers, windows, chunk, step):
            last = min(positions.stop, shape[2])  # nothing is known to follow a window
            where = (rows, slice(positions.start, last))
            parts = [x[:, : last - positions.start] for x in parts]
            following = ids[rows, positions.start + 1 : last + 1]
            likely = parts[0].topk(TOP)
            for i, x in enumerate(parts):
                target[i][where] = x.gather(-1, following[..., None])[..., 0].cpu()
                full[i][where] = (parts[0].exp() * (parts[0] - x)).sum(-1).cpu()
                same[i][where] = (x.argmax(-1) == likely.indices[..., 0]).cpu()
                bound[i][where] = _bound(likely, x)
    chunks = reader.chunks_of(len(windows[0]), chunk)
    results = []
    for i, one in enumerate(settings, 1):
        policy = reader.policy_of(one)
        low, high = statistics.bootstrap_change(target[0], target[i], seed)
        results.append(
            {
                "perplexity_stock": statistics.perplexity(target[0]),
                "perplexity": statistics.perplexity(target[i]),
                "perplexity_change": statistics.perplexity_change(target[0], target[i]),
                "perplexity_change_ci95": [low, high],
                "kl_mean_nats": float(full[i].mean()),
                "kl_p99_nats": float(np.quantile(full[i], 0.99)),
                "kl_lower_bound_mean_nats": float(bound[i].mean()),
                "top1_agreement": float(same[i].mean()),
                "archived_share_of_attended_keys": archived_share(chunks, policy),
                "predicted_tokens": int(target[0].size),
                "boundary_step_tokens": policy.align,
                "dtype": reader.dtype_of(network),
            }
        )
    return results


def _bound(likely: Any, other: torch.Tensor) -> statistics.Floats:
    """KL over stock's likeliest tokens and one bucket for the rest; (rows, positions)."""
    k = likely.indices.shape[-1]
    token_ids = likely.indices.reshape(-1, k).cpu().numpy()
    own = likely.values.reshape(-1, k).double().cpu().numpy()
    theirs = other.gather(-1, likely.indices).reshape(-1, k).double().cpu().numpy()
    flat = statistics.kl_lower_bound(token_ids, own, token_ids, theirs)
    return flat.reshape(likely.indices.shape[:-1])


def put_beside(record: Record, others: Sequence[Record]) -> Record:
    """The record with "engine": what one of `others` says of the same preset, thresholds and
    windows, or None. Of several the one with the same dtype, else with the finest."""
    same = [o for o in others if o.kind == "quality" and _measured(o) == _measured(record)]
    order = [record.results["dtype"], "float16", "bfloat16"]
    found = min(same, key=lambda other: order.index(other.results["dtype"]), default=None)
    names = (
        "perplexity_change",
        "perplexity_change_ci95",
        "kl_lower_bound_mean_nats",
        "top1_agreement",
        "boundary_step_tokens",
        "dtype",
    )
    beside: dict[str, Any] | None = None
    if found is not None:
        beside = {name: found.results[name] for name in names} | {"commit": found.commit}
    return record.model_copy(update={"results": record.results | {"engine": beside}})


def _measured(record: Record) -> tuple[Any, ...]:
    names = ("preset", "compress_after", "keep_recent", "windows", "window_tokens", "chunk")
    chosen = [record.settings.get(name) for name in names]
    texts = sorted(text.sha256 for text in record.texts)
    return record.model_sha256, chosen, texts


def _rows(record: Record) -> list[list[str]]:
    results: Any = record.results
    engine = results["engine"] or {"dtype": "not measured"}
    return [
        [
            *stored(record),
            after_and_recent(record),
            f"{results['dtype']} / {engine['dtype']}",
            change(results),
            f"{engine['perplexity_change']:+.2%}" if results["engine"] else "",
            f"{results['kl_mean_nats']:.5f}",
            f"{results['kl_lower_bound_mean_nats']:.5f}",
            f"{engine['kl_lower_bound_mean_nats']:.5f}" if results["engine"] else "",
            f"{results['predicted_tokens']:,}",
        ]
    ]


TABLES = {
    "quality-transformers": Table(
        [
            *PRESET_HEADS,
            THRESHOLDS_HEAD,
            "dtype, transformers / engine",
            "perplexity change, transformers (95 % interval)",
            "through the engine",
            "KL, whole vocabulary (nats)",
            "its lower bound, transformers",
            "through the engine",
            "tokens",
        ],
        _rows,
        "vllm-kvpca evaluate quality --through transformers",
        choose=lambda chosen, records: [put_beside(one, records) for one in chosen],
    )
}
