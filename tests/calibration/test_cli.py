"""`vllm-kvpca calibrate`, from the command line to the files."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from vllm_kvpca.calibration.card import MEASURED_ROW
from vllm_kvpca.cli import calibrate as command
from vllm_kvpca.cli.main import app
from vllm_kvpca.preset import load_preset
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS, FORMATS


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model is loaded: what is wrong must be said before."""

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(command, "_load", load)


def test_writes_a_preset_that_loads(model_folder: Path, text_file: Path, tmp_path: Path):
    more = tmp_path / "more.txt"
    more.write_text("the mat, the cat. " * 300)
    output = tmp_path / "preset"
    words = ("calibrate", "--model", model_folder, "--format", "v-mixed", "--window", 64)
    texts = ("--text", text_file, more, "--output", output, "--name", "org/Tiny", "--tokens", 4000)
    result = run(*words, *texts, "--note", "A note.")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    preset = load_preset(output)
    assert preset.config.model is not None and preset.config.model.name == "org/Tiny"
    assert preset.bases["v"].shape == (3, 2, 32, 32)
    card = (output / "README.md").read_text()
    layout = preset.layout(32)
    for words_of_card in (
        "4,000 tokens",
        "text.txt",
        "more.txt",
        "A note.",
        f"**{layout.total_ratio:.2f}**",
        f"{layout.v_ratio:.2f}",
    ):
        assert words_of_card in card
    assert f"{MEASURED_ROW} not measured |" in card


def test_the_folder_names_the_model(model_folder: Path, text_file: Path, tmp_path: Path):
    words = ("--format", "v-rank-int8", "--output", tmp_path / "preset", "--tokens", 3300)
    result = run("calibrate", "--model", model_folder, "--text", text_file, *words)
    assert result.exit_code == 0, result.output
    assert load_preset(tmp_path / "preset").config.model.name == "Tiny-Llama"


def test_too_little_text_is_refused(model_folder: Path, tmp_path: Path):
    short = tmp_path / "short.txt"
    short.write_text("the cat sat")
    words = ("--text", short, "--format", "v-mixed", "--output", tmp_path / "preset")
    result = run("calibrate", "--model", model_folder, *words)
    assert result.exit_code == 1
    assert "tokens" in result.stderr and "at least 3,200" in result.stderr.replace("\n", " ")
    assert not (tmp_path / "preset").exists()


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("name", ["v-magic", "k8v4"])
def test_formats_that_cannot_be_calibrated(name: str, text_file: Path, tmp_path: Path):
    words = ("--text", text_file, "--output", tmp_path / "preset")
    result = run("calibrate", "--model", "org/M", "--format", name, *words)
    assert result.exit_code == 1
    if name in FORMATS:
        assert "needs no calibration" in result.stderr
    else:
        assert all(known in result.stderr for known in CALIBRATED_FORMATS)


@pytest.mark.usefixtures("no_model")
def test_folders_in_use_are_left_alone(text_file: Path, tmp_path: Path):
    words = ("calibrate", "--model", "org/M", "--format", "v-mixed", "--text", text_file)
    used = tmp_path / "used"
    used.mkdir()
    (used / "config.json").write_text("{}")
    assert "--overwrite" in run(*words, "--output", used).stderr
    (used / "config.json").rename(used / "thesis.tex")
    for overwrite in ((), ("--overwrite",)):
        assert "another folder" in run(*words, "--output", used, *overwrite).stderr
    assert "a file" in run(*words, "--output", text_file).stderr
    assert "not there" in run(*words, tmp_path / "none.txt", "--output", tmp_path / "new").stderr


def test_a_model_that_is_none(text_file: Path, tmp_path: Path):
    words = ("--format", "v-mixed", "--text", text_file, "--output", tmp_path / "preset")
    result = run("calibrate", "--model", tmp_path, *words)
    assert result.exit_code == 1
    assert "cannot be loaded" in result.stderr and "--model" in result.stderr


@pytest.mark.parametrize("name", ["api-docs", "calibrate", "plot", "presets"])
def test_help_imports_no_torch(name: str):
    code = (
        "import sys\nfrom vllm_kvpca.cli.main import app\n"
        f"app([{name!r}, '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
