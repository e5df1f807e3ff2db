"""Regions of an archive page."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvpca.codec import Band
from vllm_kvpca.pages import ArchiveLayout, raw_token_bytes
from vllm_kvpca.preset import FORMATS, Preset

REGIONS = ["k_codes", "v_codes", "k_scales", "v_scales"]
widths = st.integers(1, 8).map(lambda n: 8 * n)
bands = st.lists(st.builds(Band, widths, st.sampled_from([16, 8, 4, 0])), min_size=1, max_size=4)
layouts = st.builds(
    ArchiveLayout,
    head_dim=st.just(64),
    block_size=st.integers(1, 20).map(lambda n: 16 * n),
    k_bands=bands.map(tuple),
    v_bands=bands.map(tuple),
)


@settings(deadline=None)
@given(layouts)
def test_regions_fill_a_head_without_overlap_on_16_byte_borders(layout):
    end = 0
    for name in REGIONS:
        region = getattr(layout, name)
        assert region.offset == end and region.offset % 16 == 0
        end += region.width * layout.block_size
    assert end == layout.head_bytes == layout.content_bytes * layout.block_size


@settings(deadline=None, max_examples=25)
@given(layouts)
def test_views_write_each_byte_of_a_head_once(layout):
    heads = torch.zeros(2, layout.head_bytes, dtype=torch.uint8)
    for name in REGIONS:
        view = layout.slice(heads, getattr(layout, name))
        assert view.shape == (2, layout.block_size, getattr(layout, name).width)
        view += 1
    assert (heads == 1).all()


def test_the_worked_example_of_the_module():
    layout = Preset("k8v4", FORMATS["k8v4"]).layout(64, 80)
    assert layout.content_bytes == 100 and layout.head_bytes == 8000
    offsets = [getattr(layout, name).offset for name in REGIONS]
    assert offsets == [0, 5120, 7680, 7840]
    token = [getattr(layout, name).offset + 3 * getattr(layout, name).width for name in REGIONS]
    assert token == [192, 5216, 7686, 7846]
    assert 32 * raw_token_bytes(64) == 8192
    assert layout.total_ratio == pytest.approx(2.56)


@pytest.mark.parametrize(
    ("name", "head_dim", "total", "v"),
    [
        ("raw", 64, 1.0, 1.0),
        ("k8v8", 64, 256 / 132, 128 / 66),
        ("k8v4", 64, 256 / 100, 128 / 34),
        ("k8v4", 128, 512 / 196, 256 / 66),
        ("v-hadamard-mixed", 64, 256 / 176, 128 / 48),
        ("v-hadamard-mixed", 128, 512 / 348, 256 / 92),
    ],
)
def test_ratios_count_the_scales(name, head_dim, total, v):
    layout = Preset(name, FORMATS[name]).layout(head_dim)
    assert layout.total_ratio == pytest.approx(total)
    assert layout.v_ratio == pytest.approx(v)


def test_ratios_do_not_depend_on_the_block_size():
    preset = Preset("k8v4", FORMATS["k8v4"])
    assert preset.layout(128, 16).total_ratio == preset.layout(128, 96).total_ratio


def test_scales_are_a_view_in_bfloat16():
    layout = ArchiveLayout(64, 16, (Band(32, 8), Band(32, 4)), (Band(64, 8),))
    heads = torch.zeros(3, layout.head_bytes, dtype=torch.uint8)
    layout.scales(heads, layout.k_scales)[1, 5, 1] = 1.5
    at = layout.k_scales.offset + 5 * layout.k_scales.width + 2
    assert heads[1, at : at + 2].view(torch.bfloat16).item() == 1.5
    assert heads.count_nonzero() == 2


def test_scales_of_a_format_without_any():
    layout = ArchiveLayout(64, 16, (Band(64, 16),), (Band(64, 16),))
    heads = torch.zeros(3, 2, layout.head_bytes, dtype=torch.uint8)
    scales = layout.scales(heads, layout.v_scales)
    assert scales.shape == (3, 2, 16, 0) and scales.dtype == torch.bfloat16
