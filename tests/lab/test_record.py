"""Records: what is written is what is read, and nothing personal goes in."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from vllm_kvpca.lab import record


def test_round_trip(make, tmp_path):
    first, second = make(), make(kind="quality", slug="m-k8v4-0-0", results={"x": [1, None, 2.5]})
    assert first.write(tmp_path) == tmp_path / "capacity-m-k8v4.json"
    second.write(tmp_path)
    assert record.load_all(tmp_path) == [first, second]
    assert record.load_all(tmp_path, "quality") == [second]
    assert record.load_all(tmp_path / "nothing") == []


def test_the_same_slug_replaces(make, tmp_path):
    make().write(tmp_path)
    newer = make(results={"tokens": 1})
    newer.write(tmp_path)
    assert record.load_all(tmp_path) == [newer]


def test_unknown_fields_and_nan_are_refused(make, tmp_path):
    path = make().write(tmp_path)
    content = json.loads(path.read_text()) | {"surprise": 1}
    path.write_text(json.dumps(content))
    with pytest.raises(ValidationError, match="surprise"):
        record.load_all(tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        make(results={"x": float("nan")}).write(tmp_path)


def test_a_kind_that_begins_like_another_is_not_mixed_up(make, tmp_path):
    make(kind="block-life").write(tmp_path)
    make(kind="block").write(tmp_path)
    assert [r.kind for r in record.load_all(tmp_path, "block")] == ["block"]


def test_made_record_knows_model_text_and_machine(tmp_path, monkeypatch):
    model = tmp_path / "Some-Model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    text = tmp_path / "text.txt"
    text.write_text("words")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["x", "evaluate", "--model", str(model), "--text", "a b"])
    made = record.make_record("capacity", ["K8V4", "0-0"], str(model), {}, {}, [text], seed=3)
    assert made.slug == "some-model-k8v4-0-0"
    assert made.model == "Some-Model"
    assert made.command == "vllm-kvpca evaluate --model ~/Some-Model --text 'a b'"
    assert made.texts[0].sha256 == hashlib.sha256(b"words").hexdigest()
    assert (made.texts[0].name, made.texts[0].size) == ("text.txt", 5)
    expected = hashlib.sha256(b"config.json" + b"{}" + b"model.safetensors" + b"weights")
    assert made.model_sha256 == expected.hexdigest()
    assert made.versions["torch"] and made.hardware.cores >= 1
    assert made.seed == 3
    assert str(tmp_path) not in made.model_dump_json()


def test_source_state_is_that_of_git():
    tree = Path(record.__file__).parents[2]
    commit, dirty = record.source_state()
    if commit is None:
        pytest.skip("the package does not run from a git checkout")
    head = ["git", "-C", str(tree), "rev-parse", "HEAD"]
    assert commit == subprocess.run(head, capture_output=True, text=True).stdout.strip()
    assert isinstance(dirty, bool)


def test_slug():
    assert record.slug("SmolLM2-135M_Instruct", "", "k8v4", "v 1.5") == (
        "smollm2-135m-instruct-k8v4-v-1.5"
    )
