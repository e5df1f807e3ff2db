"""A calibration that is cut off goes on where it was, and ends with the same sums."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from vllm_kvpca.calibration import output as outputs
from vllm_kvpca.calibration.collect import attention_shape, collect
from vllm_kvpca.calibration.resume import FILE, Progress
from vllm_kvpca.cli.main import app

WINDOWS = [[i, i + 1, i + 2, 7] for i in range(10)]


class Cut(Exception):
    pass


def test_sums_after_a_cut_are_those_of_one_run(model: Any, tmp_path: Path):
    shape = attention_shape(model)
    saved = Progress(tmp_path, {"a": 1}, every=3)

    def cut_after_7(moments: Any) -> None:
        saved.save(moments)
        if moments.windows == 7:
            raise Cut

    with pytest.raises(Cut):
        collect(model, shape, ["k", "q", "v"], WINDOWS, after_window=cut_after_7)
    again = Progress(tmp_path, {"a": 1}).load()
    assert again is not None and (again.windows, again.tokens) == (6, 24)
    resumed = collect(model, shape, ["k", "q", "v"], WINDOWS[6:], moments=again)
    whole = collect(model, shape, ["k", "q", "v"], WINDOWS)
    assert (resumed.windows, resumed.tokens) == (10, 40)
    for which in "kqv":
        assert torch.equal(resumed.mean(which), whole.mean(which))
        for layer in shape.layers:
            assert torch.equal(resumed.firsts[which][layer], whole.firsts[which][layer])


def test_sums_of_other_arguments_are_not_taken(model: Any, tmp_path: Path):
    saved = Progress(tmp_path, {"tokens": 100}, every=1)
    collect(model, attention_shape(model), ["v"], WINDOWS, after_window=saved.save)
    assert Progress(tmp_path, {"tokens": 100}).load() is not None
    assert Progress(tmp_path, {"tokens": 200}).load() is None
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:1000])  # damaged: as if there were none
    assert Progress(tmp_path, {"tokens": 100}).load() is None


def test_the_command_goes_on(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def calibrate(output: Path, *more: str) -> Any:
        words = ["--model", model_folder, "--text", text_file, "--format", "k5v4", "--window", 64]
        words += ["--tokens", 3300, "--output", output, *more]
        return CliRunner().invoke(app, ["calibrate", *map(str, words)])

    assert calibrate(tmp_path / "whole").exit_code == 0

    def full_disk(*_: Any) -> None:
        raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(outputs, "save_preset", full_disk)
        assert isinstance(calibrate(tmp_path / "cut").exception, Cut)
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [FILE]
    result = calibrate(tmp_path / "cut")
    assert result.exit_code == 0, result.output
    assert "3,072 tokens were done by an earlier run" in result.stderr  # 48 windows of 64
    assert not (tmp_path / "cut" / FILE).exists()
    bases = [
        load_file(tmp_path / name / "basis.safetensors")["k_basis"] for name in ("whole", "cut")
    ]
    assert torch.equal(*bases)


def test_a_pass_for_several_formats_goes_on(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Cut off in the middle of the text, where only the sums are there."""
    output, formats = tmp_path / "presets", ("k5v4", "k4v4", "v-mixed")
    words = ["--model", model_folder, "--text", text_file, "--window", 64, "--tokens", 3300]
    words += [word for one in formats for word in ("--format", one)] + ["--output", output]
    command = ["calibrate", *map(str, words)]
    save = Progress.save

    def cut_after_40(self: Progress, moments: Any) -> None:
        save(self, moments)
        if moments.windows == 40:
            raise Cut

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "save", cut_after_40)
        assert isinstance(CliRunner().invoke(app, command).exception, Cut)
    assert [path.name for path in output.iterdir()] == [FILE]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "2,048 tokens were done by an earlier run" in result.stderr  # 32 windows of 64
    assert {path.name for path in output.iterdir()} == set(formats)
    command[-1] = str(tmp_path / "whole")
    assert CliRunner().invoke(app, command).exit_code == 0
    for one in formats:
        again, whole = (
            folder / one / "basis.safetensors" for folder in (output, tmp_path / "whole")
        )
        assert again.read_bytes() == whole.read_bytes()


def test_the_report_is_a_table_and_a_record(model_folder: Path, text_file: Path, tmp_path: Path):
    words = ["--model", model_folder, "--text", text_file, "--format", "v-mixed", "--tokens", 3300]
    words += ["--output", tmp_path / "preset", "--records", tmp_path / "records"]
    result = CliRunner().invoke(app, ["calibrate", *map(str, words)], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "K PCA gain" in result.stderr and "condition" in result.stderr
    from vllm_kvpca.lab.record import load_all

    (record,) = load_all(tmp_path / "records", "calibration")
    assert record.model == "Tiny-Llama" and record.texts[0].name == "text.txt"
    rows: Any = record.results["layers"]
    assert [(row["layer"], row["tensor"]) for row in rows] == [
        (layer, which) for layer in range(3) for which in "kv"
    ]
    assert all(len(row["spectrum"]) == 32 and row["coding_gain_db"] > 0 for row in rows)
