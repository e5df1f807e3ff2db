"""`GET /kv_compression` without an engine: its key, its schema, its answer where nothing is
compressed. tests/e2e/test_http.py asks a real server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from vllm_kvpca.metrics import METRICS
from vllm_kvpca.serving.observe.endpoint import PATH, KvCompressionEndpoint

STATUS = {
    "layers": [
        {"kind": "RecentSpec", "names": ["layers.5.attn"]},
        {"kind": "SlidingWindowSpec", "names": ["layers.0.attn", "layers.1.attn"]},
    ],
    "head_dim": 128,
    "kv_heads": 4,
    "raw_block": 40,
    "archive_block": 104,
    "page_bytes": 81920,
    "step": 520,
    "figures": {
        **{metric.key: 1.0 for metric in METRICS if not metric.states},
        **{f"{metric.key}/{state}": 2.0 for metric in METRICS for state in metric.states},
        **{
            f"{metric.key}/{part}": 3.0
            for metric in METRICS
            if metric.kind == "histogram"
            for part in ("count", "sum")
        },
    },
}
for _metric in METRICS:
    if _metric.kind == "histogram" or _metric.key == "preset_info":
        STATUS["figures"].pop(_metric.key)


class Core:
    """Two data-parallel engines."""

    engine_ranks_managed = (0, 1)

    async def call_utility_all_async(self, method: str) -> list[dict]:
        assert method == "kvpca_status"
        return [STATUS, STATUS]


def client_of(*, keys: list[str] | None = None, compression: dict | None = None) -> TestClient:
    app = FastAPI()
    app.state.args = SimpleNamespace(api_key=keys)
    additional = {} if compression is None else {"kv_compression": compression}
    app.state.kvpca_engine_client = SimpleNamespace(
        vllm_config=SimpleNamespace(
            additional_config=additional,
            model_config=SimpleNamespace(served_model_name="served"),
        ),
        engine_core=Core(),
    )
    KvCompressionEndpoint().attach_router(app)
    return TestClient(app)


@pytest.fixture(autouse=True)
def no_key_in_environment(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY", raising=False)


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Basic one", "Bearer", "one"])
def test_without_the_servers_key_nothing_is_told(header):
    client = client_of(keys=["one", "two"], compression={"preset": "k8v4"})
    answer = client.get(PATH, headers={"Authorization": header} if header else {})
    assert answer.status_code == 401
    assert "k8v4" not in answer.text


def test_each_of_the_servers_keys_opens_it():
    client = client_of(keys=["one", "two"], compression={"preset": "k8v4"})
    for key in ("one", "two"):
        answer = client.get(PATH, headers={"Authorization": f"Bearer {key}"})
        assert answer.status_code == 200


def test_a_key_in_the_environment_counts_as_the_servers(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    client = client_of(compression={"preset": "k8v4"})
    assert client.get(PATH).status_code == 401
    answer = client.get(PATH, headers={"Authorization": "Bearer secret"})
    assert answer.status_code == 200


def test_a_server_that_does_not_compress_says_so():
    answer = client_of().get(PATH)
    assert answer.status_code == 404
    assert "--kv-compression-preset" in answer.json()["detail"]


def test_the_answer_names_layers_layout_and_every_engine():
    answer = client_of(compression={"preset": "k8v4", "keep_recent": 64}).get(PATH).json()
    assert answer["compress_after"] == 512 and answer["keep_recent"] == 64
    compressed, left = answer["layers"]
    assert compressed["compressed"] and compressed["names"] == ["layers.5.attn"]
    assert not left["compressed"] and left["count"] == 2 and "window" in left["reason"]
    layout = answer["layout"]
    # K: 128 codes of 8 bits; V: 128 codes of 4 bits; two scales of 2 bytes.
    assert layout["archived_token_bytes"] == 128 + 64 + 4
    assert layout["total_ratio"] == pytest.approx(512 / 196)
    assert layout["v"]["bands"] == [{"components": 128, "bits": 4}]
    assert [engine["engine"] for engine in answer["engines"]] == [0, 1]
    figures = answer["engines"][1]["figures"]
    assert figures["kv_cache_bytes"] == {"raw": 2, "archived": 2, "free": 2}
    assert figures["archive_step_seconds"] == {"count": 3, "sum": 3}


def test_the_schema_describes_every_figure():
    schema = client_of().get("/openapi.json").json()
    operation = schema["paths"][PATH]["get"]
    assert operation["security"] == [{"HTTPBearer": []}]
    figures = schema["components"]["schemas"]["Figures"]["properties"]
    told = {metric.key: metric.help for metric in METRICS if metric.key != "preset_info"}
    assert set(figures) == set(told)
    assert all(told[key] in figures[key]["description"] for key in told)
