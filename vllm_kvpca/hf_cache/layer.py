"""One layer's K and V: an archive of codes and scales, then the recent tokens as they are.

A forward pass attends to what was archived before it, restored, to the recent tokens and to its
own new tokens, both raw; then the tokens below the new boundary are archived. The server does
the same (serving/step/run.py), so both give a token the same precision at the same time, except
that the server's boundary moves in the steps of its blocks.

Gradients flow to the K and V of the tokens of one forward pass, through attention to them. What is
stored, archived and recent alike, is a constant to later passes: rounding has no gradient, and a
graph kept with it would hold every raw token that the archive is there to save.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer

from vllm_kvpca.codec.bands import narrow
from vllm_kvpca.errors import UnsupportedError
from vllm_kvpca.ops.layer_codec import LayerCodec
from vllm_kvpca.pages.boundary import Policy

RESTORE_CHUNK = 1024
"""Tokens restored at once: bounds the float32 copies beside the result."""

CodecMaker = Callable[[int, int, torch.dtype, torch.device], LayerCodec]
"""The codec for (kv_heads, head_dim, dtype, device); refuses shapes the preset does not fit."""

BatchMap = Callable[[torch.Tensor], torch.Tensor]


class Archive:
    """The archived tokens of one layer's K or V. Tokens are appended and never encoded again.

    Nothing of it belongs to a graph of automatic differentiation.

    Attributes:
        codes: (batch, tokens, kv_heads, code_bytes) uint8.
        scales: (batch, tokens, kv_heads, num_scales) bfloat16.
    """

    def __init__(self, codec: LayerCodec, which: str, states: torch.Tensor) -> None:
        self.codec = codec
        self.which = which
        self.codes, self.scales = self._encode(states[:, :, :0], 0)

    def __len__(self) -> int:
        return self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def append(self, states: torch.Tensor) -> None:
        """Archive (batch, kv_heads, tokens, head_dim) raw states behind what is there."""
        codes, scales = self._encode(states, len(self))
        self.codes = torch.cat([self.codes, codes], 1)
        self.scales = torch.cat([self.scales, scales], 1)

    def restore_into(self, out: torch.Tensor) -> None:
        """Write all archived tokens to `out`, (batch, kv_heads, tokens, head_dim)."""
        for first in range(0, len(self), RESTORE_CHUNK):
            part = slice(first, first + RESTORE_CHUNK)
            y = self.codec.decode(self.codes[:, part], self.scales[:, part], self.which)
            positions = _positions(first, y)
            x = self.codec.restore(y.flatten(0, 1), self.which, positions)
            x = x.unflatten(0, y.shape[:2])
            out[:, :, part] = narrow(x.transpose(1, 2), out.dtype)

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` tokens; the others' memory is given back."""
        self.map_batch(lambda x: x[:, :tokens].clone())

    def map_batch(self, change: BatchMap) -> None:
        """Apply the same change of rows to codes and scales."""
        self.codes, self.scales = change(self.codes), change(self.scales)

    def _encode(self, states: torch.Tensor, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        rows = states.detach().transpose(1, 2)  # (batch, tokens, kv_heads, head_dim)
        positions = _positions(first, rows)
        codes, scales = self.codec.encode(rows.flatten(0, 1), self.which, positions)
        return codes.unflatten(0, rows.shape[:2]), scales.unflatten(0, rows.shape[:2])


def _positions(first: int, rows: torch.Tensor) -> torch.Tensor:
    """Of the (batch, tokens) of `rows`, row by row: padding counts as tokens do."""
    batch, tokens = rows.shape[:2]
    return torch.arange(first, first + tokens, device=rows.device).repeat(batch)


class CompressedLayer(DynamicLayer):
    """A full-attention layer of a `PresetCache`.

    `keys` and `values` hold the recent tokens, (batch, kv_heads, tokens, head_dim).

    Attributes:
        k_archive, v_archive: the archived tokens, None before the first forward pass.
    """

    # A crop gives no raw form back to tokens that were archived meanwhile.
    is_croppable = False

    def __init__(self, policy: Policy, make_codec: CodecMaker) -> None:
        super().__init__()
        self.policy = policy
        self._make_codec = make_codec
        self.k_archive: Archive | None = None
        self.v_archive: Archive | None = None

    @property
    def archived(self) -> int:
        """Archived tokens of each sequence."""
        return len(self.k_archive) if self.k_archive is not None else 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Check the model's shape against the preset, then begin empty."""
        if key_states.shape != value_states.shape:
            raise UnsupportedError(
                f"K and V of unequal shapes {tuple(key_states.shape)} and "
                f"{tuple(value_states.shape)} cannot be compressed: use transformers' DynamicCache."
            )
        _, heads, _, head_dim = key_states.shape
        codec = self._make_codec(heads, head_dim, key_states.dtype, key_states.device)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states[:, :, :0].detach().clone()
        self.values = value_states[:, :, :0].detach().clone()
        self.k_archive = Archive(codec, "k", key_states)
        self.v_archive = Archive(codec, "v", value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new tokens and return all of them in the model's dtype.

        Args:
            key_states, value_states: (batch, kv_heads, new tokens, head_dim).

        Returns:
            K and V, (batch, kv_heads, all tokens, head_dim): restored, then raw. Only the new
            tokens have gradients.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.k_archive is not None and self.v_archive is not None
        keys = _join(self.k_archive, self.keys, key_states)
        values = _join(self.v_archive, self.values, value_states)
        first = self.archived
        # After a crop the boundary may lie below what is archived already.
        last = max(first, self.policy.boundary(keys.shape[2]))
        if last > first:
            self.k_archive.append(keys[:, :, first:last])
            self.v_archive.append(values[:, :, first:last])
        self.keys, self.values = _kept(keys, last), _kept(values, last)
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens of each sequence, archived and raw."""
        return self.archived + self.keys.shape[2] if self.is_initialized else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: negative or 0, that many tokens; or positive, which transformers
                calls deprecated, the number of tokens to keep.
        """
        length = self.get_seq_length()
        keep = tokens_to_remove if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        if keep >= length:
            return
        assert self.k_archive is not None and self.v_archive is not None
        if keep < self.archived:
            self.k_archive.crop(keep)
            self.v_archive.crop(keep)
        recent = keep - self.archived
        self.keys, self.values = (x[:, :, :recent].clone() for x in (self.keys, self.values))

    def reset(self) -> None:
        """Forget everything; the next forward pass may have another batch size."""
        super().reset()
        self.k_archive = self.v_archive = None

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Rows in the order of the chosen beams; codes are copied, never made anew."""
        self._map_batch(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_batch(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map_batch(lambda x: x[indices.to(x.device)])

    def _map_batch(self, change: BatchMap) -> None:
        if not self.is_initialized:
            return
        assert self.k_archive is not None and self.v_archive is not None
        self.k_archive.map_batch(change)
        self.v_archive.map_batch(change)
        self.keys, self.values = change(self.keys), change(self.values)


def _kept(states: torch.Tensor, first: int) -> torch.Tensor:
    """Tokens from `first` on, to be stored: without their graph, and if they are not all, without
    the memory of the others, which a view would keep alive."""
    states = states.detach()
    return states[:, :, first:].clone() if first else states


def _join(archive: Archive, recent: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """(batch, kv_heads, all tokens, head_dim) of the three parts, in one allocation."""
    archived, raw = len(archive), len(archive) + recent.shape[2]
    batch, heads, tokens, head_dim = new.shape
    out = new.new_empty(batch, heads, raw + tokens, head_dim)
    archive.restore_into(out[:, :, :archived])
    out[:, :, archived:raw] = recent
    out[:, :, raw:] = new
    return out
