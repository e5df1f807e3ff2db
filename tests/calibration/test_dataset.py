"""Datasets as text: names, rows to a file, and what is said where there is none."""

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvpca.calibration.dataset import DatasetName, fetch, write_text
from vllm_kvpca.cli.main import app
from vllm_kvpca.errors import CalibrationError, OptionsError, SetupError


def test_names():
    assert DatasetName.parse("org/set") == DatasetName("org/set", None, "train", "text")
    full = "Salesforce/wikitext@wikitext-2-raw-v1:test:body"
    assert DatasetName.parse(full) == DatasetName(
        "Salesforce/wikitext", "wikitext-2-raw-v1", "test", "body"
    )
    for wrong in ("", "a:b:c:d", "a::text"):
        with pytest.raises(OptionsError, match="NAME"):
            DatasetName.parse(wrong)


def test_rows_become_a_file_of_limited_size(tmp_path: Path):
    path = tmp_path / "text.txt"
    write_text(
        ({"body": f"row {i}\n"} for i in range(10**9)), DatasetName("s", column="body"), 20, path
    )
    assert path.read_text() == "row 0\nrow 1\nrow 2\nrow 3\n"


def test_a_column_that_is_none_is_named(tmp_path: Path):
    path = tmp_path / "text.txt"
    with pytest.raises(CalibrationError, match=r"'text'; it has id, body"):
        write_text([{"id": 1, "body": "x"}], DatasetName("s"), 20, path)
    assert not path.exists()


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SetupError, match="pip install datasets"):
        fetch(DatasetName("org/set"), 1000, tmp_path)
    # A text that was fetched before needs neither package nor network.
    (tmp_path / "org-set-train-text-10000.txt").write_text("the cat")
    assert fetch(DatasetName("org/set"), 1000, tmp_path).read_text() == "the cat"


def test_no_text_at_all(tmp_path: Path):
    words = ["calibrate", "--model", "org/M", "--format", "v-mixed", "--output", str(tmp_path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1 and "--dataset" in result.stderr
