"""Byte layout of pages, and which block sizes share a page well."""

from vllm_kvpca.pages.block_sizes import PagePlan, plan_pages
from vllm_kvpca.pages.layout import ArchiveLayout, Region, raw_token_bytes

__all__ = ["ArchiveLayout", "PagePlan", "Region", "plan_pages", "raw_token_bytes"]
