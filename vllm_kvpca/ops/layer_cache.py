"""One layer's pages, with the codec that reads and writes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_kvpca.ops.layer_codec import LayerCodec


@dataclass(frozen=True)
class LayerCache:
    """What the ops of one layer work on.

    Attributes:
        recent: (blocks, kv_heads, raw_block, 2 * head_dim) in the model's dtype.
        pages: (blocks, kv_heads, head_bytes) uint8, the archive.
        codec: of the layer's KV heads on this rank.
    """

    recent: torch.Tensor
    pages: torch.Tensor
    codec: LayerCodec
