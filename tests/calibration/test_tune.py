"""`vllm-kvpca tune` on a tiny model, and how strictly it statistics."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from vllm_kvpca.calibration import tune
from vllm_kvpca.calibration.strict import target_logprobs
from vllm_kvpca.calibration.tune import Target, choose
from vllm_kvpca.cli.main import app
from vllm_kvpca.errors import CalibrationError, OptionsError
from vllm_kvpca.lab.record import Record
from vllm_kvpca.preset import FORMATS, Preset, load_preset

WORDS = "the cat sat on a mat and saw 42 things, then left. It was late; isn't it? "
PRESETS = [Preset(name, FORMATS[name]) for name in ("k8v8", "k8v4")]
"""Total ratios 1.94 and 2.56 at head_dim 64."""


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.3,  # so that attention matters to the answers
        bos_token_id=0,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator([WORDS], trainer)
    target = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    model.save_pretrained(target)
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(target)
    return target


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{i}: {WORDS}" for i in range(300)))
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def tuned(folder: Path, text_file: Path, output: Path, *more: Any) -> Result:
    words = ("--window", 64, "--tokens", 3200, "--measure-tokens", 256, "--context", 0)
    words += ("--output", output)
    return run("tune", "--model", folder, "--text", text_file, *words, *more)


def test_a_ratio_gives_the_format_that_loses_least(folder: Path, text_file: Path, tmp_path: Path):
    output = tmp_path / "preset"
    result = tuned(folder, text_file, output, "--target-ratio", 2.4, "--per-layer")
    assert result.exit_code == 0, result.output
    record = Record.model_validate_json((output / "tune-tiny-llama-preset.json").read_bytes())
    found: Any = record.results["formats"]
    assert len(found) >= 3 and all(one["total_ratio"] >= 2.4 for one in found.values())
    least = min(found, key=lambda name: found[name]["perplexity_change"])
    preset = load_preset(output)
    assert record.results["chosen"] == preset.config.format == least
    assert found[least]["total_ratio"] == preset.layout(32).total_ratio
    assert f"{found[least]['perplexity_change']:+.2%}" in (output / "README.md").read_text()
    layers: Any = record.results["layers"]
    assert [one["layer"] for one in layers[least]] == [0, 1]


def test_a_loss_gives_the_highest_ratio_and_a_cut_off_run_goes_on(
    folder: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    output = tmp_path / "preset"
    measured: list[str | None] = []

    def count(model: Any, windows: Any, preset: Any = None, *rest: Any) -> Any:
        measured.append(preset and preset.name)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return target_logprobs(model, windows, preset, *rest)

    monkeypatch.setattr(tune, "target_logprobs", count)
    # Less than any format loses but k8v8: the ladder is climbed from its end.
    words = ("--target-ppl-delta", 0.0005)
    assert tuned(folder, text_file, output, *words).exit_code != 0
    assert len(json.loads((output / "tune.json").read_text())["results"]) == 2
    before, measured[:] = measured[1:3], [None] * 4
    result = tuned(folder, text_file, output, *words)
    assert result.exit_code in (0, 1), result.output
    assert not set(before) & set(measured) and "measured before" in result.output
    found = json.loads((output / "tune.json").read_text())["results"]
    if result.exit_code == 0:
        chosen = load_preset(output).config.format
        assert found[chosen]["perplexity_change"] <= 0.0005
        worse = [n for n in found if found[n]["total_ratio"] > found[chosen]["total_ratio"]]
        assert all(found[name]["perplexity_change"] > 0.0005 for name in worse)
    else:
        assert "Raise --target-ppl-delta" in result.output


@pytest.mark.parametrize("calibrated", [True, False])
def test_the_preset_knows_its_text_and_evaluate_refuses_it(
    folder: Path, text_file: Path, tmp_path: Path, calibrated: bool, monkeypatch: pytest.MonkeyPatch
):
    """A format that needs no calibration, too: this text decided that it was taken."""
    every = tune.candidates

    def some(*arguments: Any) -> list[Preset]:
        return [one for one in every(*arguments) if one.config.calibrated == calibrated]

    monkeypatch.setattr(tune, "candidates", some)
    output = tmp_path / "preset"
    result = tuned(folder, text_file, output, "--target-ratio", 2)
    assert result.exit_code == 0, result.output
    assert load_preset(output).config.calibrated == calibrated
    words = ("--model", folder, "--preset", output, "--output", tmp_path / "records")
    result = run("evaluate", "quality", *words, "--text", text_file)
    assert result.exit_code == 1
    assert "was calibrated on text.txt" in result.output.replace("\n", " ")
    # A copied passage is known again as well, which needs more than the card's checksums.
    (tmp_path / "copy.txt").write_text(text_file.read_text()[1000:12000])
    result = run("evaluate", "quality", *words, "--text", tmp_path / "copy.txt")
    assert result.exit_code == 1
    assert "of the evaluation text is in the calibration text" in result.output.replace("\n", " ")


def test_other_text_drops_what_was_measured(folder: Path, text_file: Path, tmp_path: Path):
    output = tmp_path / "preset"
    words = ("--target-ratio", 3.4)
    assert tuned(folder, text_file, output, *words).exit_code == 0
    text_file.write_text("another. " + text_file.read_text())
    result = tuned(folder, text_file, output, *words, "--overwrite")
    assert result.exit_code == 0 and "measured before" not in result.output


def test_losses_are_those_of_the_codec_in_every_token(model: Any):
    """Against a model whose K and V are replaced layer by layer, with plain arithmetic."""
    window = list(range(5, 45))
    ids = torch.tensor([window])

    def plain(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        x = output.unflatten(-1, (2, 32))
        scale = (x.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
        return ((x / scale).round() * scale).flatten(-2)

    layers = model.base_model.layers
    # V passes to the cache as it is projected, so a hook can stand in for the codec.
    hooks = [layer.self_attn.v_proj.register_forward_hook(plain) for layer in layers]
    try:
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
    finally:
        for hook in hooks:
            hook.remove()
    wanted = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].double().numpy()
    config = FORMATS["k8v8"].model_copy(update={"k": FORMATS["raw"].k})
    got = target_logprobs(model, [window], Preset("v8", config), [0, 1])
    np.testing.assert_allclose(got[0], wanted, rtol=0, atol=1e-5)
    stock = target_logprobs(model, [window])
    assert np.abs(got - stock).max() > 1e-4
    one = target_logprobs(model, [window], Preset("v8", config), [1])
    assert not np.allclose(one, got, atol=1e-6) and not np.allclose(one, stock, atol=1e-6)


def test_of_formats_that_reach_the_ratio_the_least_loss_counts():
    losses = {"k8v8": 0.001, "k8v4": 0.002}

    def measure(preset: Preset) -> dict[str, float]:
        return {"perplexity_change": losses[preset.name]}

    assert choose(PRESETS, 64, Target(ratio=1.9), measure).name == "k8v8"
    assert choose(PRESETS, 64, Target(ratio=2.0), measure).name == "k8v4"
    assert choose(PRESETS, 64, Target(ppl_delta=0.002), measure).name == "k8v4"
    assert choose(PRESETS, 64, Target(ppl_delta=0.0015), measure).name == "k8v8"
    with pytest.raises(CalibrationError, match=r"k8v8 loses least \(\+0\.10%\)"):
        choose(PRESETS, 64, Target(ppl_delta=0.0005), measure)
    with pytest.raises(CalibrationError, match=r"k8v4 has 2\.56"):
        choose(PRESETS, 64, Target(ratio=math.pi), measure)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ({}, "either"),
        ({"ratio": 2.0, "ppl_delta": 0.01}, "either"),
        ({"ratio": 0.9}, "saves nothing"),
        ({"ppl_delta": -0.01}, "below 0"),
    ],
)
def test_targets_that_make_no_sense(target: dict[str, float], words: str):
    with pytest.raises(OptionsError, match=words):
        Target(**target)


def test_too_little_text_to_measure_on(folder: Path, text_file: Path, tmp_path: Path):
    words = ("--window", 64, "--tokens", 1_000_000, "--output", tmp_path / "p")
    result = run("tune", "--model", folder, "--text", text_file, "--target-ratio", 2, *words)
    assert result.exit_code == 1 and "2 are needed" in result.output.replace("\n", " ")
