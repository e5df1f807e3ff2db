"""Presets for models whose weights were not at hand: chosen by architecture, not calibrated.

Shapes are those of the models' public config.json. Qwen2 and Qwen2.5 add a bias to K that reaches
hundreds in some channels, so their K is rotated before it is rounded (benchmarks/key_bias.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvpca.calibration.card import MEASURED_ROW
from vllm_kvpca.pages import ArchiveLayout, raw_token_bytes
from vllm_kvpca.preset.formats import DEFAULT, DEFAULT_WITH_KEY_BIAS, FORMATS, RECOMMENDED
from vllm_kvpca.preset.measured import NOT_MEASURED
from vllm_kvpca.preset.schema import ModelShape, PresetConfig

_BIASED = """\
Models of this family add a bias to K, up to 414 in Qwen2.5-7B. In a simulation with a bias of 400 \
in two or four channels, int8 with one scale per token moves attention weights by 0.4 nats (KL \
divergence); after a Hadamard rotation it is 0.01 to 0.03, and without a bias 0.0001 \
(benchmarks/key_bias.py, docs/results.md). So K is rotated here, and should still be measured. \
Where quality matters more than memory, `v-hadamard-mixed` leaves K raw."""
_PLAIN = """\
This model's K has no bias, so int8 with one scale per token suffices for K as it is; V is rounded \
to int4 after a Hadamard rotation, which needs no calibration."""


@dataclass(frozen=True)
class Architecture:
    """A model family's shape, and an instruct model to name in commands."""

    shape: ModelShape
    example: str
    key_bias: bool

    @property
    def format(self) -> str:
        return DEFAULT_WITH_KEY_BIAS if self.key_bias else DEFAULT

    @property
    def preset(self) -> str:
        """Name of the shipped preset."""
        return f"{self.shape.name.replace('/', '--')}/{self.format}"

    def config(self) -> PresetConfig:
        return FORMATS[self.format].model_copy(update={"model": self.shape})


def _family(
    name: str, layers: int, heads: int, head_dim: int, example: str, key_bias: bool
) -> Architecture:
    shape = ModelShape(name=name, num_layers=layers, num_kv_heads=heads, head_dim=head_dim)
    return Architecture(shape, example, key_bias)


ARCHITECTURES = (
    _family("Qwen/Qwen2.5-7B", 28, 4, 128, "Qwen/Qwen2.5-7B-Instruct", True),
    _family("Qwen/Qwen2-1.5B", 28, 2, 128, "Qwen/Qwen2-1.5B-Instruct", True),
    _family("Qwen/Qwen2.5-0.5B", 24, 2, 64, "Qwen/Qwen2.5-0.5B-Instruct", True),
    _family("mistralai/Mistral-7B", 32, 8, 128, "mistralai/Mistral-7B-Instruct-v0.3", False),
    _family("meta-llama/Llama-3.1-8B", 32, 8, 128, "meta-llama/Llama-3.1-8B-Instruct", False),
)


def write_card(architecture: Architecture) -> str:
    """Text of README.md. Its first line says that nothing was measured on the model."""
    config, shape = architecture.config(), architecture.shape
    k, v = (tensor.resolve(shape.head_dim) for tensor in (config.k, config.v))
    layout = ArchiveLayout(shape.head_dim, 16, k, v)
    raw = raw_token_bytes(shape.head_dim)
    return f"""\
**Not measured on {shape.name}:** its weights were not at hand; chosen by architecture alone.

# {config.format} for {shape.name}

{config.description}

* Model: {shape.name} and its variants (such as {architecture.example}); {shape.num_layers} \
layers, {shape.num_kv_heads} KV heads, head_dim {shape.head_dim}
* {_BIASED if architecture.key_bias else _PLAIN}

| Per token and KV head | raw | archived | ratio |
| --- | --- | --- | --- |
| K and V, scales included | {raw} B | {layout.content_bytes} B | **{layout.total_ratio:.2f}** |
| V alone | {raw // 2} B | {layout.v_bytes} B | {layout.v_ratio:.2f} |

## Measured

| What | Result |
| --- | --- |
{MEASURED_ROW} {NOT_MEASURED} |

## Measure it, calibrate a better one

What it costs on your model and text, against stock vLLM:

    vllm-kvpca evaluate quality --model {architecture.example} --preset {architecture.preset} \
--text FILES

A preset fitted to the model (K in a basis weighted by the queries):

    vllm-kvpca calibrate --model {architecture.example} --format {RECOMMENDED} --text OTHER_FILES \
--output DIR
"""
