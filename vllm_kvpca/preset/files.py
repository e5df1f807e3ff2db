"""Load, save and find presets. A preset is untrusted input: no pickle, limits on every size.

<folder>/config.json          PresetConfig
<folder>/basis.safetensors    "k_basis", "v_basis": (layers, kv_heads, head_dim, head_dim)
                              float32 or float16, only for calibrated formats
<folder>/README.md            the card: where it comes from, what was measured
<folder>/calibration.json     the texts it was fitted to (see calibration.overlap); optional
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vllm_kvpca.codec.basis import (
    ORTHONORMAL_TOLERANCE,
    hadamard_basis,
    orthonormality_error,
)
from vllm_kvpca.errors import PresetInvalid, PresetMismatch, PresetNotFound
from vllm_kvpca.pages.layer_plan import Stream
from vllm_kvpca.pages.layout import ArchiveLayout
from vllm_kvpca.preset.forks import one_thread
from vllm_kvpca.preset.formats import FORMATS, RECOMMENDED
from vllm_kvpca.preset.names import same_family, same_model
from vllm_kvpca.preset.schema import PresetConfig, TensorFormat

CONFIG_FILE = "config.json"
BASIS_FILE = "basis.safetensors"
CARD_FILE = "README.md"
TEXTS_FILE = "calibration.json"
MAX_CONFIG_BYTES = 1 << 20
MAX_BASIS_BYTES = 4 << 30
MAX_CONDITION = 1e4
"""Of bases that are not orthonormal: beyond this the float16 of a file is not exact enough."""


@dataclass(frozen=True)
class Preset:
    """A loaded, checked preset.

    Attributes:
        name: how the user asked for it.
        config: the format, and the model it belongs to.
        bases: "k" and "v" to (layers, kv_heads, head_dim, head_dim) float32, where calibrated.
    """

    name: str
    config: PresetConfig
    bases: dict[str, torch.Tensor] = field(default_factory=dict)

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
            index = self.config.layers.index(layer) if self.config.layers is not None else layer
            return self.bases[which][index][heads].contiguous()

    def check_model(
        self,
        names: list[str],
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        layers: list[int],
    ) -> None:
        """Refuse a model this preset was not made for.

        Args:
            names: the model's path and other names; one of them must match the preset's.
                None at all: the name is not known and not checked.
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
        same = same_model if self.config.calibrated else same_family
        if names and not any(same(shape.name, name) for name in names):
            wrong.append(f"model {shape.name}")
        if wrong:
            model = names[0] if names else "MODEL"
            made = "calibrated" if self.config.calibrated else "chosen"
            raise PresetMismatch(
                f"preset {self.name!r} was {made} for another model: it has "
                f"{', '.join(wrong)}{f'; you have {model!r}' if names else ''}. "
                f"Use a calibration-free format ({', '.join(FORMATS)}) or calibrate one: "
                f"vllm-kvpca calibrate --model {model} "
                f"--format {self.config.format if self.config.calibrated else RECOMMENDED} "
                "--text FILES --output DIR."
            )


def shipped_root() -> Path:
    """Folder of the shipped presets: in the wheel, or `presets/` of a checkout."""
    package = Path(__file__).resolve().parent.parent
    packaged = package / "_presets"
    return packaged if packaged.is_dir() else package.parent / "presets"


def list_shipped() -> dict[str, Path | None]:
    """Names of all shipped presets; calibration-free formats have no folder."""
    names: dict[str, Path | None] = dict.fromkeys(FORMATS, None)
    root = shipped_root()
    for config in sorted(root.glob(f"*/*/{CONFIG_FILE}")):
        names[config.parent.relative_to(root).as_posix()] = config.parent
    return names


def load_preset(name: str | os.PathLike[str]) -> Preset:
    """Load and check a preset.

    Args:
        name: a folder, a shipped name such as "k8v4" or
            "HuggingFaceTB--SmolLM2-135M-Instruct/v-mixed", or a Hub repository "org/name".

    Raises:
        PresetNotFound: nothing of that name.
        PresetInvalid: files missing or damaged, unknown fields, NaN, or no orthonormal basis.
    """
    name = os.fspath(name)
    folder = preset_folder(name)
    return _load_folder(name, folder) if folder else Preset(name, FORMATS[name])


def preset_folder(name: str) -> Path | None:
    """Where a preset's files are, downloaded if need be; None for a named format.

    Raises:
        PresetNotFound: nothing of that name.
    """
    if own := _own_folder(name):
        return own
    shipped = list_shipped()
    return shipped[name] if name in shipped else _download(name, list(shipped))


def _own_folder(name: str) -> Path | None:
    try:
        folder = Path(name).expanduser()
        return folder if folder.is_dir() else None
    except (OSError, RuntimeError):  # a name too long for a path, or ~ of an unknown user
        return None


def _download(name: str, shipped: list[str]) -> Path:
    known = f"Known names: {', '.join(shipped)}. Or give a folder or a Hub repository org/name."
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise PresetNotFound(f"there is no preset {name!r}. {known}")
    from huggingface_hub import snapshot_download

    try:
        files = [CONFIG_FILE, BASIS_FILE, CARD_FILE, TEXTS_FILE]
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:
        # The Hub client raises many unrelated types; to the user all mean "not there".
        raise PresetNotFound(
            f"there is no folder or shipped preset {name!r}, and the Hub did not give it: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} {known}"
        ) from error


def _load_folder(name: str, folder: Path) -> Preset:
    config = load_config(name, folder / CONFIG_FILE)
    if not config.calibrated:
        return Preset(name, config)
    with one_thread():
        return Preset(name, config, _load_bases(name, folder / BASIS_FILE, config))


def load_config(name: str, path: Path) -> PresetConfig:
    """config.json, checked; `name` is what the user asked for, for messages."""
    if not path.is_file():
        raise PresetNotFound(f"preset {name!r} has no {CONFIG_FILE} (looked for {path}).")
    if path.stat().st_size > MAX_CONFIG_BYTES:
        raise PresetInvalid(f"{path} is larger than {MAX_CONFIG_BYTES} bytes: not a preset.")
    try:
        return PresetConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise PresetInvalid(
            f"{path} is not a valid preset: {where}: {first['msg']}"
            f"{f' (and {error.error_count() - 1} more)' if error.error_count() > 1 else ''}. "
            "Correct the file or calibrate the preset anew."
        ) from error


def _load_bases(name: str, path: Path, config: PresetConfig) -> dict[str, torch.Tensor]:
    again = "Download it again or calibrate it anew."
    if not path.is_file():
        raise PresetInvalid(f"preset {name!r} needs {path}, which is missing. {again}")
    if path.stat().st_size > MAX_BASIS_BYTES:
        raise PresetInvalid(f"{path} is larger than {MAX_BASIS_BYTES} bytes: not a preset.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PresetInvalid(f"{path} cannot be read ({error}): truncated? {again}") from error
    wanted = [which for which in "kv" if getattr(config, which).calibrated]
    if set(tensors) != {f"{which}_basis" for which in wanted}:
        raise PresetInvalid(f"{path} holds {sorted(tensors)}, not the bases of {wanted}. {again}")
    return {w: _check_basis(path, w, tensors[f"{w}_basis"], config, again) for w in wanted}


def _check_basis(
    path: Path, which: str, basis: torch.Tensor, config: PresetConfig, again: str
) -> torch.Tensor:
    model = config.model
    assert model is not None  # the schema demands it for calibrated formats
    layers = model.num_layers if config.layers is None else len(config.layers)
    shape = (layers, model.num_kv_heads, model.head_dim, model.head_dim)
    if tuple(basis.shape) != shape or basis.dtype not in (torch.float16, torch.float32):
        raise PresetInvalid(
            f"{path}: {which}_basis is {basis.dtype} {tuple(basis.shape)}, "
            f"not float16 or float32 {shape} as {CONFIG_FILE} says. {again}"
        )
    if not torch.isfinite(basis).all():
        raise PresetInvalid(f"{path}: {which}_basis holds NaN or infinity. {again}")
    if getattr(config, which).basis == "balanced":
        condition = float(torch.linalg.cond(basis.double()).max())
        if not condition < MAX_CONDITION:
            raise PresetInvalid(
                f"{path}: {which}_basis cannot be inverted (condition number {condition:.3g}). "
                f"{again}"
            )
        return basis.float()
    error = orthonormality_error(basis)
    if error > ORTHONORMAL_TOLERANCE:
        raise PresetInvalid(
            f"{path}: {which}_basis is not orthonormal (|B^T B - I| up to {error:.3g}). {again}"
        )
    return basis.float()


def save_preset(
    folder: str | os.PathLike[str],
    config: PresetConfig,
    bases: dict[str, torch.Tensor],
    card: str,
) -> None:
    """Write a preset folder: config.json, basis.safetensors (float16) and README.md.

    Args:
        folder: created if missing; files of the same names are replaced.
        bases: "k" and/or "v" to (layers, kv_heads, head_dim, head_dim).
        card: text of README.md.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config.model_dump(mode="json", exclude_none=True), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n")
    if bases:
        tensors = {f"{which}_basis": basis.half().contiguous() for which, basis in bases.items()}
        save_file(tensors, folder / BASIS_FILE)
        # safetensors writes a file that only its owner can read; presets are shared.
        (folder / BASIS_FILE).chmod(0o644)
    (folder / CARD_FILE).write_text(card)
