"""What the GPU benches make of their measurements; measuring itself needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.lab import attention_contenders, gpu_engines
from vllm_kvpca.lab.docs import tables
from vllm_kvpca.lab.engine import STOCK, EngineSettings
from vllm_kvpca.lab.measurements import engine_bench, kernels, memory_limited
from vllm_kvpca.lab.record import load_all
from vllm_kvpca.preset import load_preset

ROOT = Path(__file__).parents[2]


def row(shape, contender, microseconds, gigabytes=1000.0):
    return {
        "shape": shape,
        "contender": contender,
        "token_head_bytes": 512,
        "microseconds": microseconds,
        "gigabytes_per_second": gigabytes,
    }


def test_kernels_are_compared_with_flash_attention_of_the_same_shape():
    rows = [row("1x8", "fa3-bf16", 10.0), row("1x8", "k8v4", 4.0), row("2x8", "k8v4", 5.0)]
    results = kernels.compare(rows, bandwidth=2000.0)
    assert [r["against_fa3_bf16"] for r in results["rows"]] == [1.0, 2.5, None]
    assert [r["share_of_read_bandwidth"] for r in results["rows"]] == [0.5] * 3


def test_more_sets_of_blocks_where_one_would_fit_the_cache():
    assert attention_contenders.Shape(64, 4096).sets(512) == 1
    small = attention_contenders.Shape(1, 32768)
    assert small.sets(196) * small.context * small.kv_heads * 196 >= 150e6


def engine(tokens, speed, milliseconds):
    return {
        "tokens": tokens,
        "loads": [
            {"name": name, "tokens_per_second": speed + below}
            for name, below in (("below compress_after", 100.0), ("decode", 0.0))
        ],
        "first_token_milliseconds": {"2048": milliseconds},
    }


def test_engines_are_compared_with_stock():
    results = engine_bench.compare(
        {STOCK: engine(100, 10.0, 50.0), "k8v4": engine(240, 15.0, 55.0)}
    )
    against = results["against_stock"]["k8v4"]
    assert against["tokens"] == 2.4
    assert against["loads"]["decode"] == 1.5
    assert against["first_token_time"] == {"2048": 1.1}


def test_every_engine_and_kernel_gets_its_line(make):
    results = engine_bench.compare({STOCK: engine(100, 10.0, 50.0), "k8v4": engine(240, 15, 55)})
    text = tables.table("engine", [make(kind="engine", slug="e", results=results)])
    assert "| `k8v4` | 240 (2.40x) | 15 (1.50x) |" in text
    rows = [row(f"{n}x8", name, us) for n in (1, 2) for name, us in (("fa3-bf16", 10), ("k8v4", 4))]
    results = kernels.compare(rows, 2000.0)
    text = tables.table("kernels", [make(kind="kernels", slug="k", results=results)])
    assert "| kernel | 1 x 8 | 2 x 8 |" in text
    assert "| `k8v4` | 4 us (2.50x) | 4 us (2.50x) |" in text


def test_memory_limited_engines_are_compared_with_stock(make):
    speeds = {STOCK: (100, 2.0), "k8v4": (240, 5.0)}

    def measured(settings):
        tokens, speed = speeds[settings.preset]
        return {"tokens": tokens, "tokens_per_second": speed}

    settings = EngineSettings(model="m", max_model_len=64, kv_gib=1)
    *_, results = gpu_engines.each_engine(settings, ["k8v4", STOCK], measured)
    record = make(kind="memory-limited", slug="m", results=memory_limited.compare(results))
    assert "| `k8v4` | 240 | 5 (2.50x) |" in tables.table("memory-limited", [record])


def test_engines_of_calibrated_formats_load_a_preset_that_fits_the_model(monkeypatch):
    model = str(ROOT / "benchmarks" / "models" / "Qwen2.5-7B-shaped")
    seen = []

    def measured(settings):
        if settings.preset != STOCK:
            preset = load_preset(settings.preset)  # as the engine does, which checks the bases
            preset.check_shape(28, 4, 128, list(range(28)))
            seen.append((preset.config.format, preset.layout(128).total_ratio))
        return {"tokens": 1, "tokens_per_second": 1.0}

    settings = EngineSettings(model=model, max_model_len=64, kv_gib=1)
    *_, results = gpu_engines.each_engine(settings, ["k5.5v5.5"], measured)
    assert list(results) == [STOCK, "k5.5v5.5"]
    assert seen == [("k5.5v5.5", pytest.approx(512 / (2 * (48 + 40 + 4))))]


@pytest.mark.parametrize("name", ["k5.5v5.5", "k4v4"])
def test_kernels_of_calibrated_formats_have_a_basis_for_each_head(name):
    preset = attention_contenders._preset(name, attention_contenders.Shape(1, 8))
    basis = preset.basis("k", 0, [0, 1, 2, 3], 128)
    torch.testing.assert_close(basis @ basis.mT, torch.eye(128).expand(4, -1, -1))
    assert not torch.equal(basis[0], basis[1])


@pytest.mark.parametrize("what", ["kernels", "engine", "memory-limited"])
def test_without_a_gpu_the_bench_says_so(what, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(app, ["bench", what])
    assert result.exit_code == 1
    assert "NVIDIA GPU" in result.output


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on a machine with a GPU; what is measured is made up."""
    speeds = {STOCK: 2.0, "k8v4": 5.0}
    found = {"tokens": 100, "tokens_per_second": 2.0}
    monkeypatch.setattr(gpu_engines, "check", lambda names, model: None)
    monkeypatch.setattr(engine_bench, "measure", lambda s: engine(100, speeds[s.preset], 50.0))
    monkeypatch.setattr(memory_limited, "measure", lambda s: found)
    monkeypatch.setattr(kernels, "read_bandwidth", lambda: 2000.0)
    measured = lambda shape, names: [row(shape.name, name, shape.heads) for name in names]  # noqa: E731
    monkeypatch.setattr(kernels, "measure", measured)


@pytest.mark.parametrize("what", ["kernels", "engine", "memory-limited"])
def test_the_bench_writes_a_record_of_all_it_was_asked_for(what, on_a_gpu, tmp_path):
    model = str(ROOT / "benchmarks" / "models" / "Qwen2.5-7B-shaped")
    shape = ["--shape", "2x64"] if what == "kernels" else []
    words = ["bench", what, "--model", model, "--preset", "k8v4", *shape]
    result = CliRunner().invoke(app, [*words, "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    [record] = load_all(tmp_path)
    assert (record.kind, record.model) == (what, "Qwen2.5-7B-shaped")
    if what == "kernels":
        rows = record.results["rows"]
        names = ["k8v4", "k8v4, all archived"]
        assert [r["contender"] for r in rows] == [*attention_contenders.PEERS, *names]
        assert {(r["shape"], r["microseconds"]) for r in rows} == {("2x64", 28)}
        assert record.settings == {"heads": 28, "kv_heads": 4, "head_dim": 128}
    else:
        assert set(record.results["engines"]) == {STOCK, "k8v4"}
        assert record.settings["max_num_seqs"] == 256 and record.settings["eager"] is False


def test_a_shape_that_makes_no_sense_is_refused(on_a_gpu):
    result = CliRunner().invoke(app, ["bench", "kernels", "--shape", "8 x many"])
    assert result.exit_code == 1
    assert "BATCHxCONTEXT" in result.output
