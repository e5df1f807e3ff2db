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
from vllm_kvpca.preset import find, list_shipped

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


def test_the_list_has_one_whole_line_for_each_preset_at_80_columns():
    """Rendered as a terminal shows it: nothing is longer than it, so nothing is wrapped or cut."""
    result = run(columns=80)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert all(len(line) <= 80 for line in lines)
    rows = {row["name"]: row for row in json.loads(run("--json").stdout)}
    first_words = [line.split()[0] for line in lines if line.startswith("  ")]
    assert first_words == ["total", *rows]  # the heading of the columns, then each full name once
    model = None
    for line in lines:
        words = line.split()
        if not line.startswith("  "):
            model = line
        elif words[0] in rows:
            row = rows[words[0]]
            assert model == (row["model"] or "any model")
            worst = max((one["change"] for one in hardest(row)), default=None)
            assert words[1:] == [
                f"{row['total_ratio']:.2f}x",
                f"{row['v_ratio']:.2f}x",
                "-" if worst is None else f"{worst:+.2%}",
            ]


def hardest(row):
    """Of each model the case in which most of what was attended to was archived."""
    by_model = {}
    for one in row["measured"]:
        most = by_model.setdefault(one["model"], one)
        if one["archived"] > most["archived"]:
            by_model[one["model"]] = one
    return by_model.values()


def test_the_list_does_not_depend_on_the_terminal():
    """So that a pipe or a log has the same lines."""
    assert run(columns=40).stdout == run(columns=300).stdout


@pytest.mark.parametrize("arguments", [("--verbose",), ("k8v4", f"{SMOLLM2}/k5v4")])
def test_details(arguments):
    result = run(*arguments, columns=80)
    assert result.exit_code == 0, result.output
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    shown = {part.split()[0]: " ".join(part.split()) for part in result.stdout.split("\n\n")}
    assert list(shown) == (list(list_shipped()) if "--verbose" in arguments else list(arguments))
    assert "2.61x (V alone 3.88x) at head_dim 128" in shown["k8v4"]
    own = shown[f"{SMOLLM2}/k5v4"]
    assert "3.28x (V alone 3.76x) at head_dim 64" in own and "K in a basis weighted by" in own
    assert "94% of keys archived (SmolLM2-135M-Instruct, float16, 0/0," in own
    assert "float16, 512/256," in own and "model HuggingFaceTB/SmolLM2-135M-Instruct" in own
    for name, text in shown.items():
        assert f"--kv-compression-preset {name}" in text
    if "--verbose" in arguments:
        assert "measured not measured" in shown["Qwen--Qwen2.5-7B/kh8v4"]


def test_a_preset_that_is_not_shipped_is_shown_too(tmp_path):
    folder = tmp_path / "mine"
    shutil.copytree(list_shipped()[f"{SMOLLM2}/k4v4"], folder)
    assert "3.76x" in run(str(folder)).stdout
    (row,) = json.loads(run(str(folder), "--json").stdout)
    assert row["name"] == str(folder) and row["format"] == "k4v4" and row["measured"] == []
    result = run("k9v9")
    assert result.exit_code == 1 and "there is no preset 'k9v9'" in result.stderr


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
