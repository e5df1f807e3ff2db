"""The figures of an engine within a Python program: what `/metrics` and the JSON route show."""

from __future__ import annotations

from typing import Any

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.serving.settings.options import asks_for_compression


def kv_metrics(llm: Any) -> dict[str, Any]:
    """Figures of the KV cache of a `vllm.LLM` that compresses, as of now.

    `LLM.get_metrics()` lists vLLM's own metrics only. These are the ones of `GET /kv_compression`:
    the table in docs/metrics.md, by their names without `kvpca_` (and without `_total`).

    Args:
        llm: a `vllm.LLM` (or its `LLMEngine`), with its engine in this process or in its own.

    Returns:
        Name -> number; for a metric with a label `state`: state -> number; for a histogram its
        `count` and `sum`. Counters are totals since the engine started. Units as in the table.

    Raises:
        UnsupportedError: the engine does not compress, or is no `LLM`.
    """
    from vllm_kvpca.serving.observe.endpoint import nested

    engine = getattr(llm, "llm_engine", llm)
    client = getattr(engine, "engine_core", None)
    in_process = getattr(client, "engine_core", None)
    if client is not None and not asks_for_compression(engine.vllm_config):
        raise UnsupportedError(
            "this engine does not compress: make it with "
            'additional_config={"kv_compression": {"preset": NAME_OR_PATH}}.'
        )
    if client is None or not (in_process or hasattr(client, "call_utility")):
        raise UnsupportedError(
            f"kv_metrics takes a vllm.LLM, not {type(llm).__name__}; a server answers "
            "GET /kv_compression."
        )
    if in_process is not None:
        status = in_process.kvpca_status()
    else:
        status = client.call_utility("kvpca_status")
    return nested(status["figures"])
