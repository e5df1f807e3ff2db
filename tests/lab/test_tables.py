"""Tables between markers: made from records, checked, nothing else touched."""

import pytest
from typer.testing import CliRunner

from vllm_kvpca.cli.main import app
from vllm_kvpca.errors import OptionsError
from vllm_kvpca.lab.docs.tables import table, update

FACTS = {
    "cells": [{"archived_share": 0.0}, {"archived_share": 1.0}],
    "exact_stock": 0.25,
    "exact": 0.125,
    "token_accuracy_stock": 0.8,
    "token_accuracy": 0.7,
    "logprob_change": -0.1,
    "logprob_change_ci95": [-0.2, 0.0],
    "answers": 40,
    "dtype": "float16",
}
PARTED = {
    "prompts": [{}, {}],
    "generated_tokens": 8,
    "same_tokens_quartiles": [1.0, 2.5, 4.0],
    "never_parted": 0.5,
    "gap_median_nats": 0.02,
    "dtype": "float16",
}
ROW = {
    "name": "k8v4",
    "k": "identity 1:8",
    "v": "hadamard 1:4",
    "first_tokens_raw": 4,
    "edge_layers_raw": 0,
    "bits_per_element": 6.25,
    "total_ratio": 2.56,
    "v_ratio": 3.76,
    "perplexity_change": 0.0112,
    "perplexity_change_ci95": [0.0087, 0.014],
    "kl_mean_nats": 0.01046,
    "top1_agreement": 0.951,
}
PAGE = "# Title\n\n<!-- table:capacity -->\nold\n<!-- /table -->\n\nafter\n"


def test_update_replaces_only_what_is_marked(make):
    page = update(PAGE, [make()])
    assert page.startswith("# Title\n\n<!-- table:capacity -->\n| preset |")
    assert page.endswith("<!-- /table -->\n\nafter\n")
    assert "old" not in page
    assert "| `k8v4` | 2.56x (3.76x) | 1,000 | 2,100 | 2.10x | 1 GiB | 8,192 |" in page
    assert "vllm-kvpca evaluate capacity\n" in page
    assert "abcdef0123" in page
    assert update(page, [make()]) == page


def test_rows_are_ordered_and_of_one_kind(make):
    records = [
        make(slug="b", total_ratio=3.0, preset="b"),
        make(slug="a", total_ratio=2.0, preset="a"),
        make(kind="block-life"),
    ]
    rows = [line for line in table("capacity", records).splitlines() if line.startswith("| `")]
    assert [row[:6] for row in rows] == ["| `a` ", "| `b` "]


def test_a_model_in_the_marker_leaves_out_the_others(make):
    records = [make(slug="a", preset="a", model="org/One"), make(slug="b", preset="b", model="Two")]
    page = update(PAGE.replace("table:capacity", "table:capacity One"), records)
    assert "`a`" in page
    assert "`b`" not in page
    assert page.startswith("# Title\n\n<!-- table:capacity One -->\n")
    with pytest.raises(OptionsError, match="no record of Three"):
        table("capacity", records, "Three")


def test_every_row_has_as_many_cells_as_the_head(make):
    quality = {
        "perplexity_change": 0.0055,
        "perplexity_change_ci95": [0.001, 0.01],
        "kl_lower_bound_mean_nats": 0.004,
        "top1_agreement": 0.96,
        "predicted_tokens": 20470,
        "archived_share_of_attended_keys": 0.94,
        "dtype": "float16",
        "boundary_step_tokens": 80,
    }
    row = {"identical_tokens": 3, "generated_tokens": 4}
    speeds = {"prompt_tokens_per_second": 10.0, "decode_tokens_per_second": 5.0}
    ratios = {"prompt_ratio": 1.0, "decode_ratio": 1.0}
    records = [
        make(kind="quality", results=quality),
        make(
            kind="identity",
            results={
                "prompts": [row],
                "identical_prompts": 0,
                "largest_gap_nats": 0.01,
                "dtype": "float16",
            },
        ),
        make(kind="needle", slug="n", through="engine", results=FACTS),
        make(kind="recall", slug="r", through="transformers", results=FACTS),
        make(kind="divergence", results=PARTED),
        make(kind="quality-transformers", results=quality | {"kl_mean_nats": 0.01}),
        make(
            kind="quality-transformers",
            slug="m-alone",
            windows=7,
            results=quality | {"kl_mean_nats": 0.01},
        ),
        make(kind="throughput", results={"stock": speeds, "preset": speeds, **ratios}),
        make(),
    ]
    for record in records:
        lines = [x for x in table(record.kind, records).splitlines() if x.startswith("|")]
        assert len({line.count("|") for line in lines}) == 1
    assert "+0.55% (+0.10% to +1.00%)" in table("quality", records)
    assert "| 50% | 25.0% | 12.5% | 80.0% | 70.0% | -0.1000" in table("needle", records)
    both = table("quality-transformers", records)
    assert "| float16 / float16 | +0.55% (+0.10% to +1.00%) | +0.55% |" in both
    assert "| float16 / not measured |" in both
    assert "| 1, 2.5, 4 | 8 | 50% | 0.020 | 2 |" in table("divergence", records)


def test_the_codec_study_has_a_table_for_each_group(make):
    rows = [ROW | {"group": "together"}, ROW | {"group": "peers", "name": "fp8", "k": "raw"}]
    records = [make(kind="codec-study", results={"rows": rows})]
    together, peers = table("codec-together", records), table("codec-peers", records)
    assert "| k8v4 | `identity 1:8` | `hadamard 1:4` | first 4 tokens | 6.25 | 2.56x (3.76x)" in (
        together
    )
    assert "| fp8 | raw |" in peers and "fp8" not in together
    for text in (together, peers):
        assert len({x.count("|") for x in text.splitlines() if x.startswith("|")}) == 1
    with pytest.raises(OptionsError, match=r"python benchmarks/codec_study\.py"):
        table("codec-signed", records)


def test_which_preset_joins_what_two_records_say(make):
    """Loss and ratio come from the study of the codec, speed from the kernels' record."""
    signed = {"k": "identity 1:8", "v": "hadamard 1:4 signed", "first_tokens_raw": 0}
    studies = [
        make(
            kind="codec-study",
            slug=slug,
            predicted_tokens=tokens,
            results={"rows": [ROW | signed | {"group": "signed", "perplexity_change": loss}]},
        )
        for slug, tokens, loss in (("short", 10, 0.5), ("long", 40, 0.0067))
    ]
    row = {"shape": "16x16384", "microseconds": 1.0}
    timed = [row | {"contender": "k8v4", "against_fa3_bf16": 2.004}]
    kernels = make(kind="kernels", slug="k", model="shaped", results={"rows": timed})
    lines = table("which-preset", [*studies, kernels], "m").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert rows == ["| `k8v4`, any model | 2.56x (3.76x) | +0.67% (+0.87% to +1.40%) | 2.00x |"]
    assert any(line.startswith("m on cpu") for line in lines)
    assert any(line.startswith("shaped on cpu") for line in lines)
    with pytest.raises(OptionsError, match="vllm-kvpca bench kernels"):
        table("which-preset", studies)


def test_tune_says_what_was_chosen_among_what(make):
    formats = {
        name: {
            "total_ratio": ratio,
            "v_ratio": 2.0,
            "perplexity_change": 0.01,
            "perplexity_change_ci95": [0.0, 0.02],
        }
        for name, ratio in (("b", 3.0), ("a", 2.5))
    }
    text = table("tune", [make(kind="tune", results={"chosen": "b", "formats": formats})])
    rows = [x for x in text.splitlines() if x.startswith("| `")]
    assert rows == [
        "| `a` | 2.50x (2.00x) | +1.00% (+0.00% to +2.00%) |  |",
        "| `b` | 3.00x (2.00x) | +1.00% (+0.00% to +2.00%) | chosen |",
    ]


def test_an_option_measured_twice_is_shown_with_more_tokens(make):
    short = [ROW | {"group": "peers", "name": name, "kl_mean_nats": 0.1} for name in ("a", "b")]
    long = [ROW | {"group": "peers", "name": "a", "kl_mean_nats": 0.2}]
    records = [
        make(kind="codec-study", slug=slug, results={"rows": rows}, predicted_tokens=tokens)
        for slug, rows, tokens in (("1", short, 10), ("2", long, 40))
    ]
    lines = [x for x in table("codec-peers", records).splitlines() if x.startswith(("| a", "| b"))]
    assert sorted((x[2], "0.20000" in x) for x in lines) == [("a", True), ("b", False)]


def test_unknown_table_and_missing_record_are_refused(make):
    with pytest.raises(OptionsError, match="no table 'weather'"):
        update("<!-- table:weather -->\n<!-- /table -->", [make()])
    with pytest.raises(OptionsError, match="vllm-kvpca evaluate quality"):
        update("<!-- table:quality -->\n<!-- /table -->", [make()])


def test_command_writes_and_checks(make, tmp_path):
    records, page = tmp_path / "records", tmp_path / "page.md"
    make().write(records)
    page.write_text(PAGE)
    arguments = ["tables", str(page), "--records", str(records)]
    stale = CliRunner().invoke(app, [*arguments, "--check"])
    assert stale.exit_code == 1
    assert page.read_text() == PAGE
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert CliRunner().invoke(app, [*arguments, "--check"]).exit_code == 0
    make(results={"tokens_stock": 1, "tokens": 2, "ratio": 2}).write(records)
    assert CliRunner().invoke(app, [*arguments, "--check"]).exit_code == 1
