"""`vllm-kvpca calibrate`, from the command line to the files."""

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner, Result

from vllm_kvpca.calibration import collect, network, resume
from vllm_kvpca.calibration.card import MEASURED_ROW
from vllm_kvpca.cli.main import app
from vllm_kvpca.demo_models import folder as demo_models
from vllm_kvpca.errors import OutputError
from vllm_kvpca.lab.record import load_all
from vllm_kvpca.preset import files, load_preset, save_preset
from vllm_kvpca.preset.formats import CALIBRATED_FORMATS, FORMATS
from vllm_kvpca.preset.identity import Served


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a model is loaded: what is wrong must be said before."""

    def load(*_: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(network, "load", load)


def test_writes_a_preset_that_loads(model_folder: Path, text_file: Path, tmp_path: Path):
    more = tmp_path / "more.txt"
    more.write_text("the mat, the cat. " * 300)
    output = tmp_path / "preset"
    words = ("calibrate", "--model", model_folder, "--format", "v-mixed", "--window", 64)
    texts = ("--text", text_file, more, "--output", output, "--name", "org/Tiny", "--tokens", 4000)
    result = run(*words, *texts, "--note", "A note.", "--quantized", "Q4_0")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == str(output)
    preset = load_preset(output)
    assert preset.config.model is not None and preset.config.model.name == "org/Tiny"
    assert preset.bases["v"].shape == (3, 2, 32, 32)
    assert preset.weights is not None and preset.weights.quantized == "Q4_0"
    assert preset.check_weights(Served(str(model_folder))) is None
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


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("command", ["calibrate", "tune", "evaluate quality", "evaluate identity"])
def test_no_command_takes_what_is_no_text(command: str, model_folder: Path, tmp_path: Path):
    """Said before a model is loaded or an engine started, naming the file."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "core.txt").write_bytes(b"\x7fELF\0\0" * 100)
    words = ["--model", model_folder, "--output", tmp_path / "out"]
    more = {"calibrate": ["--format", "v-mixed"], "tune": ["--target-ratio", "2"]}
    words += more.get(command, ["--preset", "k8v4"])
    for texts in ([folder], [folder / "core.txt"]):
        result = run(*command.split(), *words, *(x for path in texts for x in ("--text", path)))
        assert result.exit_code == 1
        assert "core.txt is no text" in result.stderr, result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_of_texts(model_folder: Path, text_file: Path, tmp_path: Path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_bytes(text_file.read_bytes())
    words = ("--format", "v-mixed", "--output", tmp_path / "preset", "--tokens", 6000)
    result = run("calibrate", "--model", model_folder, "--text", folder, *words)
    assert result.exit_code == 0, result.output
    card = (tmp_path / "preset" / "README.md").read_text()
    assert "a.txt" in card and "b.txt" in card and "6,000 tokens" in card


def test_what_is_printed_can_be_given_as_a_preset(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    words = ("--format", "v-mixed", "--output", "mine", "--tokens", 3300)
    result = run("calibrate", "--model", model_folder, "--text", text_file, *words)
    assert result.exit_code == 0, result.output
    assert load_preset(result.stdout.strip()).config.calibrated


# --- several formats ------------------------------------------------------------------------

SEVERAL = ("v-mixed", "k5v4", "k4v4")
"""One needs V alone, one K and the queries, one the same in another way."""


def several(model_folder: Path, text_file: Path, output: Path, *formats: str) -> list[Any]:
    words = ["calibrate", "--model", model_folder, "--text", text_file, "--window", 64]
    words += ["--tokens", 3300, "--output", output]
    return words + [word for one in formats for word in ("--format", one)]


def test_several_formats_from_one_pass_are_those_of_a_pass_each(
    model_folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    passes: list[int] = []
    forward = collect._forward

    def count(model: Any, window: list[int], *rest: Any) -> None:
        passes.append(len(window))
        forward(model, window, *rest)

    monkeypatch.setattr(collect, "_forward", count)
    output = tmp_path / "presets"
    result = run(*several(model_folder, text_file, output, *SEVERAL, "k4v4"))
    assert result.exit_code == 0, result.output
    assert sum(passes[1:]) == 3300  # the first looks at the model's shape
    assert result.stdout.split() == [str(output / name) for name in SEVERAL]
    assert {path.name for path in output.iterdir()} == set(SEVERAL)
    for name in SEVERAL:
        alone = tmp_path / f"alone-{name}"
        assert run(*several(model_folder, text_file, alone, name)).exit_code == 0
        together = output / name
        assert {path.name for path in together.iterdir()} == {
            *("config.json", "basis.safetensors", "README.md", "calibration.json"),
            *("weights.json", "calibration-tiny-llama.json"),
        }
        for file in ("config.json", "basis.safetensors", "calibration.json", "weights.json"):
            assert (together / file).read_bytes() == (alone / file).read_bytes()
        preset = load_preset(together)
        assert (
            preset.config.format == name and f"# {name} for" in (together / "README.md").read_text()
        )
        (record,) = load_all(together, "calibration")
        assert record.settings["format"] == name and record.settings["tokens"] == 3300


def test_records_of_several_formats_do_not_replace_each_other(
    model_folder: Path, text_file: Path, tmp_path: Path
):
    words = several(model_folder, text_file, tmp_path / "presets", "v-mixed", "v-rank-int8")
    assert run(*words, "--records", tmp_path / "records").exit_code == 0
    for name in ("v-mixed", "v-rank-int8"):
        (record,) = load_all(tmp_path / "records" / name)
        assert record.settings["format"] == name
        assert not load_all(tmp_path / "presets" / name)


@pytest.mark.usefixtures("no_model")
def test_each_folder_of_several_formats_is_looked_at_first(text_file: Path, tmp_path: Path):
    output = tmp_path / "presets"

    def refusal(*more: Any) -> str:
        result = run(*several(Path("org/M"), text_file, output, "v-mixed", "k4v4"), *more)
        assert result.exit_code == 1
        return result.stderr.replace("\n", " ")

    assert "there is no format 'magic'" in refusal("--format", "magic")
    used = output / "k4v4"
    used.mkdir(parents=True)
    (output / "notes.txt").write_text("what lies beside the presets does not matter")
    (used / "config.json").write_text("{}")
    assert f"{used} holds a preset: name another folder, or add --overwrite" in refusal()
    (used / "config.json").rename(used / "thesis.tex")
    assert f"{used} holds something else" in refusal("--overwrite")
    (used / "thesis.tex").unlink()
    used.rmdir()
    used.write_text("")
    assert f"{used} is a file" in refusal("--overwrite")
    used.unlink()
    (output / "config.json").write_text("{}")
    for more in ((), ("--overwrite",)):
        assert "several formats get folders below --output" in refusal(*more)
    output = text_file
    assert f"{text_file} is a file" in refusal()


def test_presets_of_several_formats_can_be_replaced(
    model_folder: Path, text_file: Path, tmp_path: Path
):
    words = several(model_folder, text_file, tmp_path / "presets", "v-mixed", "k5v4")
    assert run(*words).exit_code == 0
    assert "add --overwrite" in run(*words).stderr
    assert run(*words, "--overwrite").exit_code == 0


# --- a disk that is full --------------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function after which every file of one of these names is cut off after its first bytes.

    safetensors reports the system's error in its own words, everybody else as an OSError.
    """

    def fill(*names: str) -> None:
        write_text = Path.write_text

        def cut_text(self: Path, text: str, *args: Any, **kwargs: Any) -> int:
            if self.name not in names:
                return write_text(self, text, *args, **kwargs)
            write_text(self, text[:10])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

        def cut_tensors(save_file: Any) -> Any:
            def save(tensors: Any, path: Path, *args: Any) -> None:
                if path.name not in names:
                    return save_file(tensors, path, *args)
                path.write_bytes(b"123")
                raise SafetensorError("I/O error: No space left on device (os error 28)")

            return save

        monkeypatch.setattr(Path, "write_text", cut_text)
        for module in (files, resume):
            monkeypatch.setattr(module, "save_file", cut_tensors(module.save_file))

    return fill


def assert_one_sentence(result: Result, folder: Path) -> None:
    assert result.exit_code == 1, result.output
    line = result.stderr.strip().splitlines()[-1]
    assert f"error: cannot write to {folder}: No space left on device. Make room there" in line
    assert "Traceback" not in result.output and isinstance(result.exception, SystemExit)
    left = [path.name for path in folder.rglob("*") if path.name.startswith(".kvpca")]
    assert not left


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("moments.safetensors", set()),
        ("config.json", {"moments.safetensors"}),
        ("basis.safetensors", {"moments.safetensors"}),
        ("README.md", {"moments.safetensors"}),
        ("calibration.json", {"moments.safetensors"}),
        (
            "calibration-tiny-llama.json",
            *({"moments.safetensors", *("config.json", "basis.safetensors", "README.md"),
               "calibration.json", "weights.json"},),
        ),
    ],
)  # fmt: skip
def test_a_full_disk_is_one_sentence_and_keeps_what_was_done(
    name: str, left: set[str], model_folder: Path, text_file: Path, tmp_path: Path,
    full_disk: Any, monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    output = tmp_path / "preset"
    words = ["calibrate", "--model", model_folder, "--text", text_file, "--format", "v-mixed"]
    words += ["--tokens", 3300, "--window", 64, "--output", output]
    with monkeypatch.context():
        full_disk(name)
        assert_one_sentence(run(*words), output)
    assert {path.name for path in output.iterdir()} == left
    monkeypatch.undo()
    again = run(*words, *(["--overwrite"] if "config.json" in left else []))
    assert again.exit_code == 0, again.output
    assert ("were done by an earlier run" in again.stderr) == bool(left)
    assert load_preset(output).config.calibrated


def test_a_preset_that_is_replaced_stays_if_the_disk_is_full(tmp_path: Path, full_disk: Any):
    folder = tmp_path / "preset"
    save_preset(folder, FORMATS["k8v4"], {}, "old")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    full_disk("README.md")
    with pytest.raises(OutputError, match="No space left"):
        save_preset(folder, FORMATS["k8v8"], {}, "new")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.usefixtures("no_model")
def test_tune_leaves_folders_in_use_alone(text_file: Path, tmp_path: Path):
    words = ("tune", "--model", "org/M", "--target-ratio", 2, "--text", text_file)
    used = tmp_path / "used"
    used.mkdir()
    (used / "config.json").write_text("{}")
    assert "--overwrite" in run(*words, "--output", used).stderr
    (used / "config.json").rename(used / "thesis.tex")
    for overwrite in ((), ("--overwrite",)):
        assert "another folder" in run(*words, "--output", used, *overwrite).stderr
    assert "a file" in run(*words, "--output", text_file).stderr


def test_tune_on_a_full_disk(model_folder: Path, text_file: Path, tmp_path: Path, full_disk: Any):
    output = tmp_path / "preset"
    words = ["tune", "--model", model_folder, "--text", text_file, "--target-ratio", 1.5]
    words += ["--tokens", 3300, "--window", 64, "--measure-tokens", 256, "--output", output]
    full_disk("tune.json")
    assert_one_sentence(run(*words), output)
    assert {path.name for path in output.iterdir()} == {"moments.safetensors"}


def test_a_full_disk_anywhere_else_is_one_sentence_too(monkeypatch: pytest.MonkeyPatch):
    def load(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/model.bin")

    monkeypatch.setattr(network, "load", load)
    words = ("--format", "v-mixed", "--text", __file__, "--output", "nowhere")
    result = run("calibrate", "--model", "org/M", *words)
    assert result.exit_code == 1
    assert "cannot write to /cache/model.bin: No space left on device" in result.stderr


def test_a_demo_model_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def convert(gguf: Path, target: Path, *_: Any) -> None:
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"123")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(demo_models, "_find_parts", lambda model: [])
    monkeypatch.setattr(demo_models, "_require", lambda *modules: None)
    monkeypatch.setattr(demo_models, "join", lambda parts, target, model, step: target)
    monkeypatch.setattr(demo_models, "convert", convert)
    output = tmp_path / "models" / "demo"
    result = run("demo-model", "--output", output)
    assert_one_sentence(result, output)
    assert not list((tmp_path / "models").iterdir())


def test_a_folder_that_cannot_be_written_to(model_folder: Path, text_file: Path):
    words = ("--format", "v-mixed", "--tokens", 3300, "--output", text_file / "below")
    result = run("calibrate", "--model", model_folder, "--text", text_file, *words)
    assert result.exit_code == 1
    assert "cannot write to" in result.stderr and "Make it writable" in result.stderr


@pytest.mark.parametrize("name", ["api-docs", "calibrate", "plot", "presets"])
def test_help_imports_no_torch(name: str):
    code = (
        "import sys\nfrom vllm_kvpca.cli.main import app\n"
        f"app([{name!r}, '--help'], standalone_mode=False)\n"
        "assert not {'torch', 'transformers', 'vllm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
