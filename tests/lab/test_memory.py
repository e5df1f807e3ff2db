"""Memory over length, against what a running engine held and against counting by hand."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.lab.measurements.memory import format_layout, run
from vllm_kvpca.lab.record import load_all
from vllm_kvpca.pages.block_sizes import held_blocks
from vllm_kvpca.pages.boundary import Policy

ROOT = Path(__file__).parents[2] / "benchmarks"
QWEN = str(ROOT / "models" / "Qwen2.5-7B-shaped")


def test_a_running_engine_held_as_many_blocks():
    """The engine's counts after each decode step; while it archives, freed blocks lag a step."""
    (record,) = load_all(ROOT / "records", "block-life")
    life, settings = record.results["preset"], record.settings
    raw_block, archive_block = life["group_block_tokens"]
    policy = Policy(settings["compress_after"], settings["keep_recent"], archive_block)
    layout = format_layout(settings["format"], 64)
    assert layout.total_ratio == pytest.approx(settings["total_ratio"])
    decoding = [
        (n, raw, archive)
        for n, raw, archive in zip(
            life["computed_tokens"], life["raw_blocks"], life["archive_blocks"], strict=True
        )
        if n and n > settings["prompt_tokens"] + 1
    ]
    assert len(decoding) > 150
    moved = {n for n, *_ in decoding if policy.boundary(n) != policy.boundary(n - 1)}
    for n, raw, archive in decoding:
        if n not in moved:
            assert (raw, archive) == held_blocks(policy, raw_block, n)
    assert len(moved) < 5


def test_bytes_of_a_long_sequence_of_a_7b_model():
    record = run(QWEN, ["k8v4"], 131_072, 512, 256)
    results = record.results
    assert results["lengths_tokens"][-1] == 131_072
    assert results["stock_bytes"][-1] == 131_072 * 28 * 4 * 512  # 7 GiB
    (row,) = results["formats"]
    held = row["raw_bytes"][-1] + row["archive_bytes"][-1]
    # 196 of 512 bytes for the archived tokens, 256 to 360 raw ones, less than 2 % of padding.
    least = 28 * 4 * (196 * (131_072 - 360) + 512 * 256)
    assert least < held < 1.02 * least
    short = [i for i, n in enumerate(results["lengths_tokens"]) if n <= 512]
    assert all(row["archive_bytes"][i] == 0 for i in short)


def test_the_command(tmp_path):
    words = ["evaluate", "memory", "--model", QWEN, "--format", "k5v4", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "k5v4" in result.output and len(load_all(tmp_path, "memory")) == 1
    result = CliRunner().invoke(app, [*words[:4], "--format", "k9v9"])
    assert result.exit_code == 1 and "k8v4" in result.stderr
