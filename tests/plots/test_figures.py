"""Figures: drawn from a record alone, the same bytes each time."""

from xml.etree import ElementTree

from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.evaluation.record import Hardware, Record


def life_record():
    tokens = [128, 256, 384, 385, None]
    life = {
        "computed_tokens": tokens,
        "raw_blocks": [4, 8, 6, 3, 0],
        "archive_blocks": [0, 0, 2, 2, 0],
        "block_bytes": 1 << 20,
    }
    stock = life | {"raw_blocks": [4, 8, 12, 13, 0], "archive_blocks": [0] * 5}
    return Record(
        kind="block-life",
        slug="m-k8v4",
        model="m",
        model_sha256="0" * 64,
        hardware=Hardware(cpu="cpu", cores=1, threads_bind=None, ram_gib=1, gpu=None),
        versions={},
        commit=None,
        dirty=None,
        command="",
        settings={
            "preset": "k8v4",
            "compress_after": 256,
            "keep_recent": 64,
            "prompt_tokens": 384,
        },
        results={"preset": life, "stock": stock},
        date="",
    )


def test_plot_command(tmp_path):
    life_record().write(tmp_path / "records")
    arguments = ["plot", "--records", str(tmp_path / "records"), "--output"]
    for folder in ("one", "two"):
        result = CliRunner().invoke(app, [*arguments, str(tmp_path / folder)])
        assert result.exit_code == 0, result.output
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert names == {f"block-life-k8v4-{t}.{e}" for t in ("light", "dark") for e in ("svg", "png")}
    svg = (tmp_path / "one" / "block-life-k8v4-dark.svg").read_bytes()
    assert svg == (tmp_path / "two" / "block-life-k8v4-dark.svg").read_bytes()
    assert ElementTree.fromstring(svg).tag.endswith("svg")


def test_plot_without_records_says_what_to_do(tmp_path):
    result = CliRunner().invoke(app, ["plot", "--records", str(tmp_path)])
    assert result.exit_code == 1
    assert "evaluate block-life" in result.output
