"""Load and save presets. A preset is untrusted input: no pickle, limits on every size.

<folder>/config.json          PresetConfig
<folder>/basis.safetensors    "k_basis", "v_basis": (layers, kv_heads, head_dim, head_dim)
                              float32 or float16, only for calibrated formats; where K is stored
                              without its bias "k_bias" (layers, kv_heads, head_dim) and
                              "k_frequencies" (head_dim / 2,)
<folder>/README.md            the card: where it comes from, what was measured
<folder>/calibration.json     the texts it was fitted to (see calibration.overlap); optional
<folder>/weights.json         samples of the model's weights (see preset.weights); optional
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from vllm_kvpca.codec.basis import hadamard_basis
from vllm_kvpca.codec.key_bias import KeyBias
from vllm_kvpca.codec.threads import one_thread
from vllm_kvpca.errors import PresetInvalid, PresetMismatch, PresetNotFound
from vllm_kvpca.pages.layer_plan import Stream
from vllm_kvpca.pages.layout import ArchiveLayout
from vllm_kvpca.preset.basis_file import K_BIAS, K_FREQUENCIES, load_bases
from vllm_kvpca.preset.find import (
    BASIS_FILE,
    CARD_FILE,
    CONFIG_FILE,
    TEXTS_FILE,
    WEIGHTS_FILE,
    list_shipped,
    preset_folder,
    read_file,
)
from vllm_kvpca.preset.formats import FORMATS, RECOMMENDED
from vllm_kvpca.preset.identity import Served, check_weights
from vllm_kvpca.preset.schema import PresetConfig, TensorFormat
from vllm_kvpca.preset.weights import WeightSamples, load_samples
from vllm_kvpca.whole_files import whole_files

__all__ = ["Preset", "list_shipped", "load_config", "load_preset", "preset_folder", "save_preset"]


@dataclass(frozen=True)
class Preset:
    """A loaded, checked preset.

    Attributes:
        name: how the user asked for it.
        config: the format, and the model it belongs to.
        bases: "k" and "v" to (layers, kv_heads, head_dim, head_dim) float32, where calibrated;
            "k_bias" and "k_frequencies", see basis_file.load_bases.
        weights: samples of the weights it was calibrated on, None if it has none.
    """

    name: str
    config: PresetConfig
    bases: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: WeightSamples | None = None

    def layout(self, head_dim: int, block_size: int = 16) -> ArchiveLayout:
        """Page layout for one head dimension; `block_size` does not change the ratios."""
        k, v = self.config.k.resolve(head_dim), self.config.v.resolve(head_dim)
        return ArchiveLayout(head_dim, block_size, k, v)

    def streams(self, head_dim: int) -> tuple[Stream, Stream]:
        """K's and V's stream of every layer with this head dimension."""
        k, v = (self._stream(which, head_dim) for which in "kv")
        return k, v

    def _stream(self, which: str, head_dim: int) -> Stream:
        tensor_format: TensorFormat = getattr(self.config, which)
        basis: str = tensor_format.basis
        if tensor_format.calibrated:
            basis = f"{basis}:{self._digests[which]}"
        if tensor_format.without_bias:
            basis += f" without bias:{self._digests[K_BIAS]}:{self._digests[K_FREQUENCIES]}"
        return Stream(which, head_dim, tensor_format.resolve(head_dim), basis)

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Of the fitted bases of all layers."""
        return {
            which: hashlib.sha256(basis.numpy().tobytes()).hexdigest()[:16]
            for which, basis in self.bases.items()
        }

    def basis(self, which: str, layer: int, heads: list[int], head_dim: int) -> torch.Tensor | None:
        """Bases of one layer's local KV heads.

        Args:
            which: "k" or "v".
            layer: index of the layer in the model.
            heads: global indices of the KV heads on this rank.

        Returns:
            (len(heads), head_dim, head_dim) float32, or None for the identity.
        """
        tensor_format: TensorFormat = getattr(self.config, which)
        if tensor_format.basis == "identity":
            return None
        with one_thread():
            if tensor_format.basis == "hadamard":
                return hadamard_basis(head_dim).expand(len(heads), -1, -1).contiguous()
            return self.bases[which][self.config.covered.index(layer)][heads].contiguous()

    def key_bias(self, layer: int, heads: list[int]) -> KeyBias | None:
        """What is taken out of K of one layer's local KV heads; None where K is stored with it.

        Args: as for `basis`.
        """
        if not self.config.k.without_bias:
            return None
        bias = self.bases[K_BIAS][self.config.covered.index(layer)][heads].contiguous()
        return KeyBias(bias, self.bases[K_FREQUENCIES])

    def check_shape(
        self, num_layers: int, num_kv_heads: int, head_dim: int, layers: list[int]
    ) -> None:
        """Refuse a model of another shape than the preset's.

        Args:
            num_layers, num_kv_heads, head_dim: the whole model's shape.
            layers: indices of the layers that would be compressed.

        Raises:
            PresetMismatch: with what differs and the way out.
        """
        shape = self.config.model
        if shape is None:
            return
        have = {"num_layers": num_layers, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
        wrong = [
            f"{key} {getattr(shape, key)} (the model has {value})"
            for key, value in have.items()
            if getattr(shape, key) != value
        ]
        covered = set(self.config.layers if self.config.layers is not None else range(num_layers))
        if missing := sorted(set(layers) - covered):
            wrong.append(f"no basis for layers {missing}")
        if wrong:
            made = "calibrated" if self.config.calibrated else "chosen"
            raise PresetMismatch(
                f"preset {self.name!r} was {made} for {shape.name}, a model of another shape: it "
                f"has {', '.join(wrong)}. "
                f"Use a calibration-free format ({', '.join(FORMATS)}) or calibrate one: "
                "vllm-kvpca calibrate --model MODEL "
                f"--format {self.config.format if self.config.calibrated else RECOMMENDED} "
                "--text FILES --output DIR."
            )

    def check_weights(
        self, model: Served, allow_other: bool = False, later: bool = False
    ) -> str | None:
        """See identity.check_weights."""
        return check_weights(self.name, self.config, self.weights, model, allow_other, later)


def load_preset(name: str | os.PathLike[str]) -> Preset:
    """Load and check a preset.

    Args:
        name: a shipped name such as "k8v4" or "HuggingFaceTB--SmolLM2-135M-Instruct/v-mixed"; a
            folder, written with a separator ("./mine"), or any path object; or a repository of
            the Hub, "org/name" or "org/name@revision".

    Raises:
        PresetNotFound: nothing of that name.
        PresetInvalid: files missing, damaged, too large or outside of the folder, unknown fields,
            NaN, or no orthonormal basis.
    """
    folder = preset_folder(name)
    name = os.fspath(name)
    if folder is None:
        return Preset(name, FORMATS[name])
    config = load_config(name, folder)
    if not config.calibrated:
        return Preset(name, config)
    with one_thread():
        return Preset(name, config, load_bases(name, folder, config), load_samples(folder))


def load_config(name: str, folder: Path) -> PresetConfig:
    """config.json of a preset's folder, checked.

    Args:
        name: what the user asked for, for messages.

    Raises:
        PresetNotFound: there is none.
        PresetInvalid: it is too large, or says what no preset says.
    """
    path = folder / CONFIG_FILE
    content = read_file(folder, CONFIG_FILE)
    if content is None:
        raise PresetNotFound(f"preset {name!r} has no {CONFIG_FILE} (looked for {path}).")
    try:
        return PresetConfig.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PresetInvalid(
            f"{path} is not a valid preset: {where}: {first['msg']}"
            f"{f' (and {error.error_count() - 1} more)' if error.error_count() > 1 else ''}. "
            "Correct the file or calibrate the preset anew."
        ) from error


def save_preset(
    folder: str | os.PathLike[str],
    config: PresetConfig,
    bases: dict[str, torch.Tensor],
    card: str,
    texts: str = "",
    weights: WeightSamples | None = None,
) -> None:
    """Write a preset folder: config.json, basis.safetensors (float16) and README.md.

    Args:
        folder: created if missing; files of the same names are replaced.
        bases: "k" and/or "v" to (layers, kv_heads, head_dim, head_dim).
        card: text of README.md.
        texts: text of calibration.json (see calibration.overlap), "" for none.
        weights: of the model it was calibrated on.

    Raises:
        OutputError: the files cannot be written; then none is.
    """
    text = json.dumps(config.model_dump(mode="json", exclude_none=True), indent=2)
    tensors = {}
    for name, tensor in bases.items():
        if name in (K_BIAS, K_FREQUENCIES):  # small, and slow frequencies are below float16
            tensors[name] = tensor.float().contiguous()
        else:
            tensors[f"{name}_basis"] = tensor.half().contiguous()
    with whole_files(Path(folder), last=CONFIG_FILE) as new:
        (new / CONFIG_FILE).write_text(text + "\n")
        (new / CARD_FILE).write_text(card)
        if texts:
            (new / TEXTS_FILE).write_text(texts)
        if weights:
            (new / WEIGHTS_FILE).write_text(weights.to_json())
        if tensors:
            save_file(tensors, new / BASIS_FILE)
            # safetensors writes a file that only its owner can read; presets are shared.
            (new / BASIS_FILE).chmod(0o644)
