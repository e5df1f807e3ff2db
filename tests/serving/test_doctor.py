"""The doctor finds what it is asked to find."""

from __future__ import annotations

from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.serving import doctor


def test_a_sound_installation_passes():
    findings = {finding.check: finding for finding in doctor.diagnose()}
    assert len(findings) == 8
    assert all(finding.ok for finding in findings.values()), findings


def test_a_plugin_kept_out_by_vllm_plugins_is_named(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "keeps it out: add kvpca" in " ".join(result.output.split())


def test_wrong_numbers_are_noticed(monkeypatch):
    """A codec that stored nothing would be off by far more than the tolerance."""
    monkeypatch.setattr("vllm_kvpca.ops.archive.reference.archive_slots", lambda *args: None)
    finding = next(f for f in doctor.diagnose() if f.check == "archive and attend")
    assert not finding.ok
    assert "is off by" in finding.detail
