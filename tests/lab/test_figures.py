"""Figures: drawn from records alone, and known to be stale when a record changes."""

from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.lab.plots.figures import figures, missing, problems
from vllm_kvpca.lab.plots.quality import points, same_text, size, study_points
from vllm_kvpca.lab.plots.themes import THEMES
from vllm_kvpca.lab.record import Hardware, Record, load_all

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "benchmarks" / "records"
DEPTHS, LENGTHS = [0.0, 0.5, 1.0], [512, 1024]


def record(kind: str, slug: str, settings: dict, results: dict, model: str = "M-135M") -> Record:
    return Record(
        kind=kind,
        slug=slug,
        model=model,
        model_sha256="0" * 64,
        hardware=Hardware(cpu="cpu", cores=1, threads_bind=None, ram_gib=1, gpu=None),
        versions={},
        commit=None,
        dirty=None,
        command="",
        settings=settings,
        results=results,
        date="",
    )


def quality(preset: str, ratio: float, change: float, model: str, after: int = 0) -> Record:
    settings = {"preset": preset, "total_ratio": ratio, "compress_after": after}
    results = {
        "dtype": "float16",
        "perplexity_change": change,
        "perplexity_change_ci95": [change - 0.001, change + 0.001],
        "predicted_tokens": 1000,
        "perplexity": 10.0 * (1 + change),
    }
    return record("quality", f"{model}-{preset}-{after}".lower(), settings, results, model)


def needle(preset: str) -> Record:
    cells = [
        {"length_tokens": n, "depth": d, "token_accuracy": 0.5, "token_accuracy_stock": 0.75}
        for n in LENGTHS
        for d in DEPTHS
    ]
    settings = {
        "preset": preset,
        "total_ratio": 2.5,
        "compress_after": 512,
        "keep_recent": 256,
        "lengths": LENGTHS,
        "depths": DEPTHS,
        "through": "engine",
    }
    return record("needle", f"m-{preset}", settings, {"cells": cells})


def study() -> Record:
    rows = [
        {"group": group, "name": name, "k": k, "v": v, "total_ratio": 2.0}
        | {"perplexity_change": change, "perplexity_change_ci95": [change - 0.001, change + 0.002]}
        | {"first_tokens_raw": 0, "edge_layers_raw": 0}
        for group, name, k, v, change in (
            ("peers", "vLLM fp8", "fp8", "fp8", 0.014),
            ("together", "older", "identity 1:8", "hadamard 1:4", 0.011),
            ("signed", "newer", "identity 1:8", "hadamard 1:4 signed", 0.008),
            ("signed", "seven", "weighted+mix 3/4:8 1/4:4 signed", "hadamard 1:4 signed", 0.008),
            ("together", "five", "weighted+mix 1/4:8 3/4:4", "hadamard 1:4", 0.015),
            ("V alone", "V pca 3/4:8 1/4:0", "raw", "pca 3/4:8 1/4:0", 0.4),
            ("K alone", "K pca 1:2", "pca 1:2", "raw", 3.5),
        )
    ]
    return record("codec-study", "m", {}, {"perplexity_stock": 10.0, "rows": rows})


def test_kinds_that_have_no_record_of_their_own_yet(tmp_path):
    """Two models with one format, a study, needles: what other commands write."""
    found = [
        quality("k8v4", 2.56, 0.002, "M-135M"),
        quality("v-rank-int8", 1.44, 0.16, "M-135M"),
        quality("k8v4", 2.6, -0.0005, "m-0.5b-it"),
        study(),
        needle("k8v4"),
        needle("k5v4"),
    ]
    for one in found:
        one.write(tmp_path / "records")
    arguments = ["plot", "--records", str(tmp_path / "records"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    names = ("frontier-m-135m", "frontier-m-0.5b-it", "perplexity", "model-size", "needle-m-135m")
    expected = {f"{name}-{theme.name}.png" for name in names for theme in THEMES}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected
    for path in (tmp_path / "out").iterdir():
        image = Image.open(path).convert("RGB")
        corner = tuple(int(THEMES["dark" in path.name].paper[i : i + 2], 16) for i in (1, 3, 5))
        assert max(abs(a - b) for a, b in zip(image.getpixel((0, 0)), corner, strict=True)) < 8
        assert min(image.size) > 400


def test_a_changed_record_makes_its_figure_stale(tmp_path):
    found = [quality("k8v4", 2.56, 0.002, "M-135M"), needle("k8v4")]
    for one in found:
        one.write(tmp_path / "records")
    arguments = ["plot", "--records", str(tmp_path / "records"), "--output", str(tmp_path / "out")]
    assert "is not drawn" in CliRunner().invoke(app, [*arguments, "--check"]).stderr
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--check"]).exit_code == 0
    changed = quality("k8v4", 2.56, 0.003, "M-135M")
    wrong = problems([changed, found[1]], tmp_path / "out")
    assert len(wrong) == 4 and all("from other records" in text for text in wrong)
    wrong = problems([found[0]], tmp_path / "out")
    assert len(wrong) == 2 and all("needle" in t and "no record" in t for t in wrong)


def test_points_are_the_hardest_case():
    chosen = [quality("a", 2.0, 0.01, "M"), quality("a", 2.0, 0.001, "M", after=512)]
    (point,) = points(chosen)
    assert (point.name, point.group) == ("a", "preset") and point.loss == pytest.approx(1.0)


def test_a_study_is_not_mixed_with_what_the_engine_measured():
    """The study archives every token before it is seen; the engine keeps its newest raw."""
    (figure,) = [f for f in figures([quality("k8v4", 2.6, 0.002, "M-135M"), study()])
                 if f.name.startswith("frontier")]  # fmt: skip
    assert [one.kind for one in figure.records] == ["codec-study"]
    found = {point.name: point for point in study_points([study()])}
    assert {name: point.group for name, point in found.items()} == {
        "vLLM fp8": "peers", "K pca 1:2": "study", "older": "study",
        "k8v4": "preset", "seven": "study", "k5v4": "preset", "v-rank-int8": "preset",
    }  # fmt: skip
    assert found["k8v4"].loss == pytest.approx(0.8)  # with all 16 levels, as the product has it
    assert found["vLLM fp8"].perplexity == pytest.approx(10.14)


def test_perplexities_of_different_texts_are_not_mixed():
    same = [quality("a", 2.0, 0.01, "M"), quality("b", 2.0, 0.01, "M")]
    other = quality("c", 2.0, 0.01, "M")
    other = other.model_copy(update={"results": {**other.results, "predicted_tokens": 2000}})
    assert same_text([other, *same]) == same


@pytest.mark.parametrize(
    ("model", "millions"),
    [
        ("SmolLM2-135M-Instruct", 135),
        ("gemma-3-270m-it", 270),
        ("Qwen2.5-7B", 7000),
        ("x-1.5b", 1500),
        ("Qwen2.5-7B-shaped", 7000),
        ("m", None),
    ],
)
def test_sizes_in_names(model, millions):
    assert size(model) == millions


def test_without_records_the_commands_that_make_them_are_named(tmp_path):
    result = CliRunner().invoke(app, ["plot", "--records", str(tmp_path)])
    assert result.exit_code == 1
    assert "evaluate block-life" in result.stderr and "calibrate" in result.stderr
    assert len(missing([])) > 8


def test_the_figures_of_the_documentation_are_drawn_from_its_records():
    found = load_all(RECORDS)
    assert problems(found, ROOT / "docs" / "images") == []
    kinds = {name for figure in figures(found) for name in [figure.name.partition("-")[0]]}
    assert {"memory", "block", "frontier", "perplexity", "spread", "decode", "dashboard"} <= kinds
