"""A preset of another model is refused by every command that takes one, before anything starts."""

from __future__ import annotations

import pytest
import torch
import typer
from transformers import Gemma3TextConfig, LlamaConfig
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.errors import LayoutError, OptionsError, PresetMismatch, PresetNotFound
from vllm_kvpca.lab import attention_contenders, engine, gpu_engines, presets
from vllm_kvpca.lab.measurements import tasks
from vllm_kvpca.preset import load_preset

SMOLLM2 = "HuggingFaceTB--SmolLM2-135M-Instruct/k4v4"


def commands(below, words=()):
    """Words of every command that takes --preset, and its required options."""
    if hasattr(below, "commands"):
        for name, command in below.commands.items():
            yield from commands(command, (*words, name))
    elif any("--preset" in option.opts for option in below.params):
        required = [option.opts[0] for option in below.params if option.required]
        yield pytest.param(words, required, id=" ".join(words))


COMMANDS = list(commands(typer.main.get_command(app)))


@pytest.fixture
def model(tmp_path):
    """Folder of a model of which there is a configuration and nothing else."""

    def write(name="other", config=None, **shape):
        common = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
        config = config or LlamaConfig(**common | {"hidden_size": 576} | shape)
        config.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return write


def test_there_are_commands_with_presets():
    assert len(COMMANDS) >= 12


@pytest.mark.parametrize(("words", "required"), COMMANDS)
@pytest.mark.parametrize("name", ["other", "SmolLM2-135M-Instruct"])
def test_refused_before_an_engine_starts(words, required, name, model, tmp_path, monkeypatch):
    def start(*args, **kwargs):
        raise AssertionError("an engine was started")

    monkeypatch.setattr(engine, "in_process", start)
    monkeypatch.setattr(engine, "start", start)
    monkeypatch.setattr(gpu_engines.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tasks, "need", lambda *modules: None)  # lm-eval need not be here
    (tmp_path / "text.txt").write_text("some text " * 1000)
    # Another name with the right shape, and the right name with another shape.
    folder = model(name) if name == "other" else model(name, num_hidden_layers=12)
    given = {"--text": str(tmp_path / "text.txt"), "--tasks": "arc_easy"}
    given |= {"--model": folder, "--preset": SMOLLM2}
    chosen = [
        word for option in {*required, "--model", "--preset"} for word in (option, given[option])
    ]
    result = CliRunner().invoke(app, [*words, *chosen, "--output", str(tmp_path / "records")])
    assert result.exit_code == 1
    assert "was calibrated for" in result.stderr
    assert ("num_layers 30 (the model has 12)" in result.stderr) == (name != "other")
    assert not (tmp_path / "records").exists()


def test_a_preset_of_the_model_is_taken(model):
    presets.check([SMOLLM2, "k8v4", "raw"], model("SmolLM2-135M-Instruct"))


def test_only_layers_with_full_attention_need_a_basis(model):
    shape = {"num_hidden_layers": 18, "num_key_value_heads": 1, "head_dim": 256}
    folder = model("gemma-3-270m", Gemma3TextConfig(**shape))
    preset = load_preset("google--gemma-3-270m/k4v4")
    assert presets.shape_of(folder).layers == preset.config.layers == (5, 11, 17)
    presets.check([preset.name], folder)


def test_a_preset_of_some_layers_can_be_timed():
    shape = attention_contenders.Shape(1, 64, heads=4, kv_heads=1, head_dim=256)
    name = "google--gemma-3-270m/k4v4"
    _, codec = attention_contenders._layer(name, shape, torch.device("cpu"))
    wanted = load_preset(name).basis("k", 5, [0], 256)  # of its first layer with full attention
    assert torch.equal(codec.k_basis.float(), wanted.to(codec.k_basis.dtype).float())


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ({"num_hidden_layers": 12}, r"num_layers 30 \(the model has 12\)"),
        ({"num_key_value_heads": 9}, r"num_kv_heads 3 \(the model has 9\)"),
        ({"head_dim": 128}, r"head_dim 64 \(the model has 128\)"),
    ],
)
def test_each_number_that_differs_is_named(shape, words, model):
    with pytest.raises(PresetMismatch, match=words) as refusal:
        presets.check([SMOLLM2], model("SmolLM2-135M-Instruct", **shape))
    assert str(refusal.value).count("(the model has") == 1


def test_what_cannot_be_checked_is_refused_too(model):
    with pytest.raises(PresetNotFound):
        presets.check(["k8v4", "no-such-preset"], model())
    with pytest.raises(LayoutError):
        presets.check(["k8v4"], model("odd", head_dim=36))
    with pytest.raises(OptionsError, match=r"configuration of --model .*nowhere cannot be read"):
        presets.check(["k8v4"], "./nowhere")
    with pytest.raises(PresetMismatch, match=r"chosen for .* of another shape"):
        presets.check(["Qwen--Qwen2.5-7B/kh8v4"], model())
