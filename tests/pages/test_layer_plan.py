"""The one object that says what a layer stores."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from vllm_kvpca.codec.bands import Band
from vllm_kvpca.pages import layer_plan
from vllm_kvpca.pages.boundary import Policy
from vllm_kvpca.pages.layer_plan import LayerPlan, Stream


def make_plan() -> LayerPlan:
    k = Stream("k", 64, (Band(64, 8),), "identity")
    v = Stream("v", 64, (Band(24, 8), Band(40, 4)), "pca:0123456789abcdef")
    return LayerPlan((k, v), torch.bfloat16, 32, 80, 512, 256, model="a")


def test_pages_and_boundary_follow_the_blocks():
    plan = make_plan()
    assert plan.archive.content_bytes == 64 + 2 + 24 + 2 + 20 + 2
    assert plan.head_page_bytes == 32 * 2 * 2 * 64
    assert plan.policy == Policy(512, 256, 80)


def test_scaled_pages_hold_that_many_times_the_tokens():
    plan = make_plan()
    twice = plan.scaled(2)
    assert (twice.raw_block, twice.archive_block) == (64, 160)
    assert twice.head_page_bytes == 2 * plan.head_page_bytes
    assert twice.archive.head_bytes == 2 * plan.archive.head_bytes
    assert twice.policy.align == 160
    assert plan.scaled(1) is plan


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.float16},
        {"raw_block": 40},
        {"archive_block": 88},
        {"kv_heads": 2},
        {"model": "b"},
        {"streams": (make_plan().streams[0], replace(make_plan().streams[1], basis="pca:0"))},
        {
            "streams": (
                make_plan().streams[0],
                replace(make_plan().streams[1], bands=(Band(64, 8),)),
            )
        },
        {"streams": (replace(make_plan().streams[0], basis="hadamard"), make_plan().streams[1])},
    ],
    ids=lambda change: next(iter(change)),
)
def test_cache_id_tells_apart_whatever_changes_a_page(change):
    assert replace(make_plan(), **change).cache_id != make_plan().cache_id


def test_cache_id_tells_layouts_apart(monkeypatch):
    before = make_plan().cache_id
    monkeypatch.setattr(layer_plan, "LAYOUT_VERSION", layer_plan.LAYOUT_VERSION + 1)
    assert make_plan().cache_id != before


def test_thresholds_do_not_change_what_a_page_means():
    assert replace(make_plan(), compress_after=0, keep_recent=0).cache_id == make_plan().cache_id


def test_another_process_comes_to_the_same_cache_id():
    plan = make_plan()
    script = "import pickle, sys; print(pickle.load(sys.stdin.buffer).cache_id)"
    answer = subprocess.run(
        [sys.executable, "-c", script], input=pickle.dumps(plan), capture_output=True, check=True
    )
    assert answer.stdout.decode().strip() == plan.cache_id
