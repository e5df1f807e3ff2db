"""The command line's frame: help, version, how errors are shown."""

import pytest
from typer.testing import CliRunner

from vllm_kvpca import __version__
from vllm_kvpca.cli.main import app
from vllm_kvpca.demo_models import folder
from vllm_kvpca.errors import SetupError


def test_help_lists_the_commands():
    result = CliRunner().invoke(app, ["--help"])
    assert result.exit_code == 0
    assert "demo-model" in result.output


def test_version():
    assert CliRunner().invoke(app, ["--version"]).output.strip() == f"vllm-kvpca {__version__}"


def test_an_error_of_ours_is_its_message_alone(monkeypatch: pytest.MonkeyPatch):
    def fail(*_, **__):
        raise SetupError("install [this] first")

    monkeypatch.setattr(folder, "ensure", fail)
    result = CliRunner().invoke(app, ["demo-model"])
    assert result.exit_code == 1
    assert result.stderr.strip() == "error: install [this] first"
    assert result.stdout == ""
