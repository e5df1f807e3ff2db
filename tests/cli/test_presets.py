"""`vllm-kvpca presets`: the list, for people and programs, and where its numbers come from."""

import json
import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvpca.calibration.card import MEASURED_ROW
from vllm_kvpca.cli.main import app
from vllm_kvpca.lab.docs import preset_cards as measured
from vllm_kvpca.lab.record import load_all
from vllm_kvpca.preset import FORMATS, find, list_shipped

RECORDS = Path(__file__).parents[2] / "benchmarks" / "records"
SMOLLM2 = "HuggingFaceTB--SmolLM2-135M-Instruct"


def run(*arguments: str, columns: int = 200):
    return CliRunner().invoke(app, ["presets", *arguments], env={"COLUMNS": str(columns)})


def test_the_list_for_programs():
    rows = {row["name"]: row for row in json.loads(run("--json").stdout)}
    assert list(rows) == list(list_shipped())
    k8v4 = rows["k8v4"]
    assert (k8v4["model"], k8v4["head_dim"]) == (None, 128)
    assert k8v4["total_ratio"] == 512 / 196 and k8v4["v_ratio"] == 256 / 66
    own = rows[f"{SMOLLM2}/k5v4"]
    assert own["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and own["head_dim"] == 64
    assert own["total_ratio"] == 256 / 78
    row = own["measured"][0]
    record = json.loads((RECORDS / row["record"]).read_text())
    assert row["change"] == record["results"]["perplexity_change"]
    assert [row["low"], row["high"]] == record["results"]["perplexity_change_ci95"]
    assert rows["Qwen--Qwen2.5-7B/kh8v4"]["measured"] == []


def test_the_list_for_people():
    result = run()
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line.startswith("│")]
    for name in FORMATS:
        assert any(name in line for line in lines)
    (qwen,) = (line for line in lines if "Qwen2.5-7B/kh8v4" in line)
    assert "2.61" in qwen and "not measured" in qwen
    (k5v4,) = (line for line in lines if f"{SMOLLM2}/k5v4" in line)
    assert "94% of keys archived" in k5v4


def test_presets_say_what_the_records_say():
    result = run("--from-records", str(RECORDS), "--check")
    assert result.exit_code == 0, result.stderr


def test_a_record_belongs_to_the_preset_of_its_model():
    records = load_all(RECORDS, "quality")
    own = [record for record in records if record.model == "SmolLM2-135M-Instruct"]
    names = {name for name in measured.measured(own) if name.endswith("/k5v4")}
    assert names == {f"{SMOLLM2}/k5v4"}
    (one,) = (r for r in records if r.settings["preset"] == "k8v4" and "0-0-float16" in r.slug)
    other = one.model_copy(update={"model": "Llama-3.1-8B-Instruct"})
    assert set(measured.measured([other])) == {"k8v4", "meta-llama--Llama-3.1-8B/k8v4"}


@pytest.mark.parametrize("name", ["measured.json", f"{SMOLLM2}/k5v4/README.md"])
def test_what_is_stale_is_found_and_written(tmp_path, monkeypatch, name):
    root = tmp_path / "presets"
    shutil.copytree(find.shipped_root(), root)
    for module in (find, measured):
        monkeypatch.setattr(module, "shipped_root", lambda: root)
    path = root / name
    right = path.read_text()
    row = f"{MEASURED_ROW} not measured |"
    path.write_text("{}" if name == "measured.json" else re.sub(r"\| Perplexity.*", row, right))
    arguments = ("--from-records", str(RECORDS))
    assert str(path) in run(*arguments, "--check").stderr.replace("\n", "")
    assert run(*arguments).stdout.split() == [str(path)]
    assert path.read_text() == right
    assert run(*arguments, "--check").exit_code == 0
