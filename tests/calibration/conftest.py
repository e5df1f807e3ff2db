"""A tiny Llama with random weights and a tokenizer of its own: nothing is downloaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = "the cat sat on a mat and\tsaw 42 things, then left.\n\n  It was late; isn't it?\r\n"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE, as most models have it."""
    return _tokenizer(bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer() -> Any:
    """The same, but every text begins with <s>."""
    return _tokenizer(bos=True)


def _tokenizer(bos: bool) -> Any:
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS], trainer)
    if bos:
        backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def config() -> LlamaConfig:
    """Two query heads to a KV head; head_dim is not hidden_size / heads."""
    return LlamaConfig(
        vocab_size=320,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
    )


@pytest.fixture(scope="session")
def model(config: LlamaConfig) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, model: Any, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def words() -> str:
    """A line of text with runs of spaces, a tab, digits, and line ends of both kinds."""
    return WORDS


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """About 4,000 tokens."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"".join(f"{i}: {WORDS}".encode() for i in range(150)))
    return path
