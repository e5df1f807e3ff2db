"""Byte layout of pages, and which block sizes share a page well."""

from vllm_kvpca.pages.block_sizes import BlockSizes, choose_blocks
from vllm_kvpca.pages.layout import ArchiveLayout, Region, raw_token_bytes

__all__ = ["ArchiveLayout", "BlockSizes", "Region", "choose_blocks", "raw_token_bytes"]
