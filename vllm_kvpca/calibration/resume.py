"""Sums of a calibration that is under way, on disk: a run that was cut off goes on from them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vllm_kvpca.calibration.card import Source
from vllm_kvpca.calibration.collect import Moments
from vllm_kvpca.whole_files import whole_files

FILE = "moments.safetensors"
EVERY = 16
"""Windows between two saves."""


class Progress:
    """The sums in the output folder, until presets are written.

    Attributes:
        path: of the file.
        key: sha256 of everything that the sums depend on; sums of another key are not taken.
    """

    def __init__(self, folder: Path, arguments: dict[str, Any], every: int | None = None) -> None:
        self.path = folder / FILE
        text = json.dumps(arguments, sort_keys=True, default=str)
        self.key = hashlib.sha256(text.encode()).hexdigest()
        self._every = every or EVERY

    @classmethod
    def of_run(cls, folder: Path, model: str, which: Sequence[str], source: Source) -> Progress:
        """Of a run over `source` that sums up `which` of "k", "v" and "q".

        Args:
            model: sha256 of the model, or whatever else names its weights.
        """
        arguments = {
            "sums": 2,  # raised when the same text gives other sums
            "model": model,
            "moments": sorted(which),
            "texts": [text.sha256 for text in source.texts],
            "budget": [source.tokens, source.window, source.seed, source.dtype, source.context],
        }
        return cls(folder, arguments)

    def load(self, device: Any = "cpu") -> Moments | None:
        """Sums of an earlier run with the same arguments, None if there are none."""
        try:
            with safe_open(self.path, "pt") as file:
                header = file.metadata() or {}
                if header.get("key") != self.key:
                    return None
                tensors = {name: file.get_tensor(name).to(device) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return None
        sums: dict[str, dict[int, torch.Tensor]] = {}
        firsts: dict[str, dict[int, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            kind, which, layer = name.split(".")
            target = sums if kind == "sum" else firsts
            target.setdefault(which, {})[int(layer)] = tensor
        return Moments(sums, int(header["tokens"]), firsts, int(header["windows"]))

    def save(self, moments: Moments) -> None:
        """Keep the sums, if it is time to.

        Raises:
            OutputError: they cannot be written; those of the last time are still there.
        """
        if moments.windows % self._every:
            return
        tensors = dict(_named("sum", moments.sums)) | dict(_named("first", moments.firsts))
        header = {
            "key": self.key,
            "tokens": str(moments.tokens),
            "windows": str(moments.windows),
        }
        with whole_files(self.path.parent) as new:
            save_file(tensors, new / self.path.name, header)


def _named(
    kind: str, sums: dict[str, dict[int, torch.Tensor]]
) -> Iterable[tuple[str, torch.Tensor]]:
    for which, layers in sums.items():
        for layer, tensor in layers.items():
            yield f"{kind}.{which}.{layer}", tensor.contiguous()
