"""What "auto" stands for, and presets chosen by architecture."""

from __future__ import annotations

import pytest

from vllm_kvpca.calibration.architecture import ARCHITECTURES, write_card
from vllm_kvpca.errors import PresetMismatch
from vllm_kvpca.preset import list_shipped, load_preset
from vllm_kvpca.preset.choose import choose_preset
from vllm_kvpca.preset.find import shipped_root
from vllm_kvpca.preset.identity import Served
from vllm_kvpca.preset.names import same_family

QWEN = "Qwen--Qwen2.5-7B/kh8v4"
QWEN_SHAPE = (28, 4, 128)


@pytest.mark.parametrize(
    ("name", "shape", "bias", "preset", "why"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", (30, 3, 64), False,
         "HuggingFaceTB--SmolLM2-135M-Instruct/k5.5v5.5", "shipped for this model"),
        ("Qwen/Qwen2.5-7B-Instruct", QWEN_SHAPE, True, QWEN, "for this architecture"),
        ("/models/Qwen2.5-7B", None, False, QWEN, "not measured on it"),
        ("Qwen/Qwen2-1.5B-Instruct", (28, 2, 128), True, "Qwen--Qwen2-1.5B/kh8v4", "large bias"),
        ("Qwen/Qwen2.5-0.5B", (24, 2, 64), True, "Qwen--Qwen2.5-0.5B/kh8v4", "architecture"),
        ("mistralai/Mistral-7B-Instruct-v0.3", (32, 8, 128), False,
         "mistralai--Mistral-7B/k8v4", "architecture"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", (32, 8, 128), False,
         "meta-llama--Llama-3.1-8B/k8v4", "architecture"),
        # A name alone is not enough: a pruned model has the bias but another shape.
        ("org/Qwen2.5-7B-pruned", (20, 4, 128), True, "kh8v4", "K has a bias"),
        ("Qwen/Qwen2.5-72B", (80, 8, 128), True, "kh8v4", "K has a bias"),
        ("org/Other", (12, 4, 64), False, "k8v4", "needs no calibration"),
    ],
)  # fmt: skip
def test_auto(name, shape, bias, preset, why):
    chosen, reason = choose_preset(Served(name), shape, bias)
    assert chosen == preset and why in reason
    assert load_preset(chosen).name == preset


def test_variants_of_a_family():
    assert same_family("Qwen/Qwen2.5-7B", "/srv/qwen2.5-7b-instruct/")
    assert same_family("meta-llama/Llama-3.1-8B", "org/Meta-Llama-3.1-8B")
    for other in ("Qwen/Qwen2.5-72B", "Qwen/Qwen2.5-7Bx", "Qwen/Qwen2x5-7B", "Qwen/Qwen2.5"):
        assert not same_family("Qwen/Qwen2.5-7B", other)


@pytest.mark.parametrize("one", ARCHITECTURES, ids=lambda one: one.preset)
def test_the_shipped_folder_is_what_the_table_says(one):
    preset, shape = load_preset(one.preset), one.shape
    assert preset.config == one.config()
    card = (shipped_root() / one.preset / "README.md").read_text()
    assert card == write_card(one), "stale: python benchmarks/architecture_presets.py"
    assert card.splitlines()[0].startswith("**Not measured on")
    assert f"calibrate --model {one.example}" in card and f"--preset {one.preset}" in card
    assert one.preset in list_shipped()
    heads = (shape.num_layers, shape.num_kv_heads, shape.head_dim, list(range(shape.num_layers)))
    preset.check_shape(*heads)
    with pytest.raises(PresetMismatch, match=r"chosen for .* num_layers"):
        preset.check_shape(99, *heads[1:])
