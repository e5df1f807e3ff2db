"""What --resume leaves out, and what is put beside each other."""

from __future__ import annotations

import shutil
import sys

import pytest

from vllm_kvpca.calibration import overlap
from vllm_kvpca.errors import CalibrationError
from vllm_kvpca.lab import against_stock
from vllm_kvpca.lab.engine import EngineSettings
from vllm_kvpca.lab.measurements import quality_transformers
from vllm_kvpca.preset import list_shipped, preset_folder

COMMIT = "abcdef0123456789"  # of the records of conftest


@pytest.fixture
def settings():
    return EngineSettings(model="m", preset="org/k8v4", max_model_len=100)


@pytest.fixture
def finished(make, settings, tmp_path, monkeypatch):
    """`against_stock.finished` beside one record of `settings`."""
    used = settings.model_dump(exclude={"model", "seed", "preset", "compress_after", "keep_recent"})
    record = make(kind="quality", **used)
    record.write(tmp_path)
    monkeypatch.setattr(sys, "argv", [*record.command.split(), "--resume"])

    def find(commit=COMMIT, dirty=False):
        monkeypatch.setattr(against_stock, "source_state", lambda: (commit, dirty))
        return against_stock.finished(tmp_path, "quality")

    return find


def test_what_this_command_measured_from_this_commit_is_done(finished, settings):
    assert finished()(settings)
    for changes in ({"preset": "k8v8"}, {"compress_after": 600}, {"dtype": "float16"}):
        assert not finished()(settings.model_copy(update=changes))


@pytest.mark.parametrize("state", [("0123", False), (COMMIT, True), (None, None)])
def test_records_of_other_sources_do_not_count(finished, settings, state):
    assert not finished(*state)(settings)


def test_records_of_other_commands_do_not_count(finished, settings, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--seed", "1"])
    assert not finished()(settings)


def test_the_same_measurement_through_the_engine_is_put_beside(make):
    results = {
        "perplexity_change": 0.1,
        "perplexity_change_ci95": [0.0, 0.2],
        "kl_lower_bound_mean_nats": 0.01,
        "top1_agreement": 0.9,
        "boundary_step_tokens": 80,
        "dtype": "float16",
    }
    engine = make(kind="quality", results=results, windows=5)
    own = {"perplexity_change": 0.11, "dtype": "float32"}
    same = make(kind="quality-transformers", results=own, windows=5)
    other = make(kind="quality-transformers", results=own, windows=6)
    coarse = engine.model_copy(update={"results": results | {"dtype": "bfloat16"}})
    beside = quality_transformers.put_beside(same, [coarse, engine]).results["engine"]
    assert (
        beside["perplexity_change"] == 0.1
        and beside["dtype"] == "float16"
        and beside["commit"] == COMMIT
    )
    assert quality_transformers.put_beside(other, [engine]).results["engine"] is None


def test_overlap_with_presets_of_all_kinds(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("nobody calibrated on this " * 100)
    shipped = "HuggingFaceTB--SmolLM2-135M-Instruct/k5v4"
    assert against_stock.overlaps(["k8v4", shipped], [text]) == {"k8v4": 0.0, shipped: 0.0}
    old = shutil.copytree(list_shipped()[shipped], tmp_path / "old")
    (old / "calibration.json").unlink()
    with pytest.warns(UserWarning, match=r"no calibration\.json"):
        assert against_stock.overlaps([str(old)], [text]) == {str(old): None}


def test_a_benchmark_that_a_preset_was_calibrated_on_is_refused(tmp_path):
    """Its passages were copied into a longer text; most presets have seen none of it."""
    shipped = next(one for one in list_shipped() if one.endswith("/k5v4"))
    passages = [" ".join(f"word{n}-{i}" for i in range(200)) for n in range(20)]
    folder = shutil.copytree(preset_folder(shipped), tmp_path / "mine")
    calibrated_on = tmp_path / "text.txt"
    calibrated_on.write_text("\n".join([*passages, "and more " * 100]))
    overlap.save(folder, [calibrated_on])
    with pytest.raises(CalibrationError, match="is in the calibration text"):
        against_stock.overlaps_of_texts([str(folder)], passages)
    assert against_stock.overlaps_of_texts([shipped, "k8v4"], passages) == {shipped: 0, "k8v4": 0}
