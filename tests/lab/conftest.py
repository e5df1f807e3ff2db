"""Records made up for tests."""

import pytest

from vllm_kvpca.lab.record import Hardware, Record


@pytest.fixture
def make():
    def make_record(kind="capacity", slug="m-k8v4", results=None, model="m", **settings):
        common = {
            "preset": "k8v4",
            "total_ratio": 2.56,
            "v_ratio": 3.7647,
            "compress_after": 512,
            "keep_recent": 256,
            "kv_gib": 1.0,
            "max_model_len": 8192,
        }
        return Record(
            kind=kind,
            slug=slug,
            model=model,
            model_sha256="0" * 64,
            hardware=Hardware(cpu="cpu", cores=2, threads_bind="0", ram_gib=1, gpu=None),
            versions={"torch": "2", "vllm": "0.32.0"},
            commit="abcdef0123456789",
            dirty=False,
            command=f"vllm-kvpca evaluate {kind}",
            settings=common | settings,
            results=results or {"tokens_stock": 1000, "tokens": 2100, "ratio": 2.1},
            date="2026-01-02T03:04:05+00:00",
        )

    return make_record
