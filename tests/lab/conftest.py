"""Records made up for tests."""

import pytest

from vllm_kvpca.lab.record import Hardware, Record


@pytest.fixture
def make():
    def make_record(kind="capacity", slug="m-k8v4", results=None, model="m", **settings):
        common = {
            "preset": "k8v4",
            "total_ratio": 2.56,
            "v_ratio": 3.7647,
            "compress_after": 512,
            "keep_recent": 256,
            "kv_gib": 1.0,
            "max_model_len": 8192,
        }
        return Record(
            kind=kind,
            slug=slug,
            model=model,
            model_sha256="0" * 64,
            hardware=Hardware(cpu="cpu", cores=2, threads_bind="0", ram_gib=1, gpu=None),
            versions={"torch": "2", "vllm": "0.32.0"},
            commit="abcdef0123456789",
            dirty=False,
            command=f"vllm-kvpca evaluate {kind}",
            settings=common | settings,
            results=results or {"tokens_stock": 1000, "tokens": 2100, "ratio": 2.1},
            date="2026-01-02T03:04:05+00:00",
        )

    return make_record


CHAT_TEMPLATE = """
{%- if tools %}{{- '<|im_start|>system\\nTools:\\n' }}
{%- for tool in tools %}{{- tool | tojson }}{{- '\\n' }}{%- endfor %}
{{- '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' }}{{- call.function | tojson }}{{- '</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""


@pytest.fixture(scope="session")
def chat_tokenizer():
    """Bytes as tokens, with a chat template that takes tools."""
    from tokenizers import Tokenizer
    from tokenizers.decoders import ByteLevel as ByteLevelDecoder
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    alphabet = {letter: i for i, letter in enumerate(sorted(ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes a package with data files, found before an installed one of that name."""
    import json

    def make_package(module, files):
        root = tmp_path / "packages" / module
        for name, content in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = content if isinstance(content, str) else "\n".join(map(json.dumps, content))
            path.write_text(lines)
        (root / "__init__.py").write_text("")
        monkeypatch.syspath_prepend(root.parent)
        return root

    return make_package
