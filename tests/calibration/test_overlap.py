"""Text that a preset was calibrated on is found, whole or in pieces."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_kvpca.calibration import overlap
from vllm_kvpca.cli.main import app
from vllm_kvpca.errors import CalibrationError, PresetInvalid


def words(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"word{draw.randrange(5000)}" for _ in range(count)]


def write(path: Path, content: list[str], per_line: int = 11) -> Path:
    lines = (" ".join(content[i : i + per_line]) for i in range(0, len(content), per_line))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    folder = tmp_path / "preset"
    folder.mkdir()
    texts = [write(tmp_path / f"c{i}.txt", words(30_000, i)) for i in range(2)]
    overlap.save(folder, texts)
    return folder


def test_text_of_other_origin_passes(preset: Path, tmp_path: Path):
    other = write(tmp_path / "other.txt", words(20_000, 9))
    assert overlap.check("p", preset, [other]) == 0


def test_the_same_file_is_refused_whatever_its_name(preset: Path, tmp_path: Path):
    copy = tmp_path / "copy.txt"
    copy.write_bytes((tmp_path / "c1.txt").read_bytes())
    with pytest.raises(CalibrationError, match=r"calibrated on copy\.txt.*give --text"):
        overlap.check("p", preset, [copy])


def test_the_estimate_is_the_share_that_was_copied(preset: Path, tmp_path: Path):
    """A quarter of the text is copied, with other line ends."""
    mixed = words(9_000, 7) + words(30_000, 1)[5_000:8_000]
    path = write(tmp_path / "mixed.txt", mixed, per_line=7)
    known = overlap.load(preset)
    assert known is not None
    assert overlap.shared(known, [path]) == pytest.approx(0.25, abs=0.05)
    with pytest.raises(CalibrationError, match=r"about 2\d% of the evaluation text"):
        overlap.check("p", preset, [path])


def test_a_common_licence_passes(preset: Path, tmp_path: Path):
    common = words(20_000, 8) + words(30_000, 0)[100:160]
    share = overlap.check("p", preset, [write(tmp_path / "licensed.txt", common)])
    assert share is not None and share < overlap.ALLOWED_SHARE


def test_short_calibration_texts_are_kept_whole(tmp_path: Path):
    source = words(500, 1)
    overlap.save(tmp_path, [write(tmp_path / "short.txt", source)])
    known = overlap.load(tmp_path)
    assert known is not None and len(known.shingles) == 500 - overlap.SHINGLE + 1
    piece = write(tmp_path / "piece.txt", source[100:200])
    assert overlap.shared(known, [piece]) == 1


def test_batches_miss_no_shingle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write(tmp_path / "t.txt", words(3_000, 2))
    [whole] = overlap.shingle_hashes(path, 50)
    monkeypatch.setattr(overlap, "_BATCH_WORDS", 170)
    parts = [int(x) for hashes in overlap.shingle_hashes(path, 50) for x in hashes]
    assert parts == whole.tolist() and len(parts) == 2951


def test_presets_from_before_are_checked_by_their_card(tmp_path: Path):
    text = write(tmp_path / "text.txt", words(100, 3))
    assert overlap.check("p", tmp_path, [text]) is None
    digest = overlap.describe(text).sha256
    (tmp_path / "README.md").write_text(f"| text.txt | 1 | `{digest}` |")
    with pytest.raises(CalibrationError, match=r"calibrated on text\.txt"):
        overlap.check("p", tmp_path, [text])


@pytest.mark.parametrize("damage", ["{", '{"texts": [], "shingle_words": 50}', "x" * (2 << 20)])
def test_a_damaged_file_is_refused(preset: Path, damage: str):
    (preset / "calibration.json").write_text(damage)
    with pytest.raises(PresetInvalid, match="calibrate anew"):
        overlap.load(preset)


@pytest.mark.parametrize(
    ("shingles", "words"),
    [(["zz"], "match pattern"), (["f" * 13], "match pattern"), (["0"] * 200_000, "1 validation")],
)
def test_hashes_that_are_none(preset: Path, shingles: list[str], words: str):
    """Refused at the first of them: a message for each would cost far more than the file."""
    known = {"texts": [], "shingle_words": 50, "shingles": shingles}
    (preset / "calibration.json").write_text(json.dumps(known))
    with pytest.raises(PresetInvalid, match="calibrate anew") as refusal:
        overlap.load(preset)
    assert words in str(refusal.value.__cause__)


def test_evaluate_refuses_before_any_model_is_loaded(
    preset: Path, tmp_path: Path, model_folder: Path
):
    """The model here is a configuration without weights and tokenizer."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_bytes((model_folder / "config.json").read_bytes())
    config = {"format": "mine", "k": BANDS, "v": BANDS}
    (preset / "config.json").write_text(json.dumps(config))
    for command in ("quality", "needle", "divergence"):
        options = ["--model", str(tmp_path / "model"), "--preset", str(preset)]
        result = CliRunner().invoke(
            app, ["evaluate", command, *options, "--text", str(tmp_path / "c0.txt")]
        )
        assert result.exit_code == 1
        assert "was calibrated on c0.txt" in result.stderr.replace("\n", " ")


BANDS = {"basis": "identity", "bands": [{"share": "1", "bits": 8}]}


def test_shipped_calibrated_presets_name_their_texts():
    from vllm_kvpca.preset import list_shipped, load_preset

    for name, folder in list_shipped().items():
        if folder is None or not load_preset(name).config.calibrated:
            continue
        known = overlap.load(folder)
        assert known is not None, f"{name} has no calibration.json"
        card = (folder / "README.md").read_text()
        assert known.texts and all(text.sha256 in card for text in known.texts)
        assert len(known.shingles) == overlap.SKETCH
