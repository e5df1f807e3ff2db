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
    block_size=st.integers(1, 40).map(lambda n: 8 * n),
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
    bits = {"k": layout.k_bands, "v": layout.v_bands}
    for which in "kv":
        stored = [band for band in bits[which] if band.bits]
        for view, band in zip(layout.codes(heads, which), stored, strict=True):
            size = 2 if band.bits == 16 else 1
            assert view.shape == (2, layout.block_size // 8, 8, band.code_bytes // size)
            view += 0x0101 if size == 2 else 1
        scales = layout.scales(heads, getattr(layout, f"{which}_scales"))
        assert scales.shape == (2, layout.block_size, sum(b.bits in (8, 4) for b in stored))
        scales.view(torch.int16).add_(0x0101)
    assert (heads == 1).all()


def test_the_worked_example_of_the_module():
    """Token 11 of a k8v4 page of 80, byte by byte."""
    layout = Preset("k8v4", FORMATS["k8v4"]).layout(64, 80)
    assert layout.content_bytes == 100 and layout.head_bytes == 8000
    assert [getattr(layout, name).offset for name in REGIONS] == [0, 5120, 7680, 7840]
    pages = torch.zeros(3, 2, layout.head_bytes, dtype=torch.uint8)
    block, token = torch.tensor([1]), torch.tensor([11])
    for which, width in (("k", 64), ("v", 32)):
        codes = torch.arange(1, 1 + width, dtype=torch.uint8).expand(1, 2, -1)
        layout.store_codes(pages, which, block, token, codes)
        assert torch.equal(layout.load_codes(pages, which, block, token), codes)
    layout.scales(pages, layout.k_scales)[1, :, 11] = 1.0
    layout.scales(pages, layout.v_scales)[1, :, 11] = 2.0
    head = pages[1, 1]
    assert head[704:768].tolist() == list(range(1, 65))
    assert [head[5379 + 8 * j].item() for j in range(32)] == list(range(1, 33))
    assert head[7702:7704].view(torch.bfloat16).item() == 1.0
    assert head[7862:7864].view(torch.bfloat16).item() == 2.0
    assert head.count_nonzero() == 64 + 32 + 2 + 1  # 1.0 has two bytes that are not 0, 2.0 one
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
