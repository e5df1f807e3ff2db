"""What must hold in every reading of /metrics, whatever the server is doing."""

from __future__ import annotations

from .server import Labels, Scrape

USED = ("raw", "archived")
GROWING = ("_total", "_bucket", "_count", "_sum")


def engines(scrape: Scrape) -> list[str]:
    """The engines that a reading tells of."""
    return sorted({dict(key)["engine"] for key in scrape.samples["kvpca_sequences"]})


def contradictions(scrape: Scrape, engine: str = "0") -> list[str]:
    """Where our figures of an engine contradict each other or vLLM's.

    A reading may be torn: vLLM answers /metrics in a thread, now and then between two gauges of
    the same engine step. Read again at once before believing it.
    """

    def value(name: str, **labels: str) -> float:
        return scrape.value(name, engine=engine, **labels)

    states = {state: value("kvpca_kv_cache_bytes", state=state) for state in (*USED, "free")}
    used, pool = states["raw"] + states["archived"], sum(states.values())
    usage = value("vllm:kv_cache_usage_perc")
    sequences = sum(value("kvpca_sequences", state=state) for state in USED)
    running = value("vllm:num_requests_running")
    wrong = []
    if abs(used / pool - usage) > 1e-6:
        wrong.append(f"{states}, but vLLM says that {usage:.4%} is used")
    if sequences != running:
        wrong.append(f"{sequences} sequences but vLLM runs {running}")
    return [f"engine {engine}: {reason}" for reason in wrong]


def pools(scrape: Scrape) -> list[float]:
    """Bytes that are raw, archived or free, of each engine: the same in every reading."""
    bytes_ = scrape.samples["kvpca_kv_cache_bytes"]
    return [
        sum(size for key, size in bytes_.items() if ("engine", engine) in key)
        for engine in engines(scrape)
    ]


def held(scrape: Scrape, engine: str = "0") -> float:
    """0 once an engine holds nothing: bytes, tokens and sequences, ours and vLLM's."""
    names = ("kvpca_kv_cache_bytes", "kvpca_kv_cache_tokens", "kvpca_sequences")
    ours = sum(scrape.value(n, engine=engine, state=state) for n in names for state in USED)
    return ours + scrape.value("vllm:num_requests_running", engine=engine)


def counters(scrape: Scrape) -> dict[tuple[str, Labels], float]:
    """Every series of ours that may only grow."""
    return {
        (name, labels): value
        for name, samples in scrape.samples.items()
        if name.startswith("kvpca_") and name.endswith(GROWING)
        for labels, value in samples.items()
    }


def fallen(before: dict, now: dict) -> list[str]:
    return [f"counter {key} fell" for key, value in before.items() if now.get(key, 0.0) < value]
