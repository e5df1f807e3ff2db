"""Samples of a model's k_proj and v_proj, by which its weights are known again.

Neither a path nor a name says whose weights a server loads, and a hash of them changes with their
dtype. So a calibrated preset carries a few values of three layers, read from where the checkpoint
has them: whole, before any sharding, and in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from vllm_kvpca.errors import PresetInvalid
from vllm_kvpca.preset.find import WEIGHTS_FILE, read_file
from vllm_kvpca.preset.schema import MAX_NAME, Layer

SAMPLES = 48
"""Values of one matrix: the relative difference of two is known to about a tenth of itself."""
_PROJECTION = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:\w+\.)*(k_proj|v_proj|qkv_proj)\.weight$")
_OTHER_TOWERS = re.compile(r"vis(ion|ual)|audio|encoder|draft|mtp")
_PLAIN = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
Values = Annotated[tuple[float, ...], Field(min_length=SAMPLES, max_length=SAMPLES)]


class WeightSamples(BaseModel):
    """`weights.json` of a preset.

    Attributes:
        quantized: how the weights were quantized before they were unpacked and calibrated on,
            e.g. "Q4_K_M"; "" if they were not. The original's weights are then near, not equal.
        layers: index of a layer to "k" and "v" to SAMPLES values of the projection.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    quantized: str = Field(default="", max_length=MAX_NAME)
    layers: dict[Layer, dict[Literal["k", "v"], Values]] = Field(min_length=1, max_length=8)

    def difference(self, others: WeightSamples) -> float:
        """|self - others| / |self| over the layers that both have; infinity if there is none."""
        both = sorted(self.layers.keys() & others.layers.keys())
        if not both:
            return float("inf")
        mine, theirs = (
            torch.tensor([one.layers[i][which] for i in both for which in ("k", "v")]).double()
            for one in (self, others)
        )
        return float((mine - theirs).norm() / mine.norm().clamp_min(1e-30))

    @property
    def digest(self) -> str:
        """16 hexadecimal digits; equal for equal values only, so not for every dtype of them."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """Text of the file; six digits are more than any dtype of a checkpoint keeps."""
        layers = {
            str(i): {which: [float(f"{x:.6g}") for x in values] for which, values in one.items()}
            for i, one in self.layers.items()
        }
        return json.dumps({"quantized": self.quantized, "layers": layers}) + "\n"


class NotComparable(Exception):
    """Why no samples can be taken, as the second half of a sentence."""


class Quantized(NotComparable):
    """The checkpoint is a quantized one: its values are not the model's."""


def load_samples(folder: Path) -> WeightSamples | None:
    """Those of a preset's folder; None if it has none.

    Raises:
        PresetInvalid: the file is no such file.
    """
    content = read_file(folder, WEIGHTS_FILE)
    if content is None:
        return None
    try:
        return WeightSamples.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise PresetInvalid(
            f"{folder / WEIGHTS_FILE} holds no samples of weights ({first['msg']}). Download the "
            "preset again or calibrate anew."
        ) from error


def of_model(model: Any, layers: Sequence[int], width: int, quantized: str = "") -> WeightSamples:
    """Samples of a model of transformers.

    Args:
        layers, width: see `of_checkpoint`.
        quantized: see WeightSamples.

    Raises:
        NotComparable: its projections have other names or are quantized.
    """
    tensors = dict(model.named_parameters())

    def read(name: str, rows: Sequence[int], columns: Sequence[int]) -> list[float]:
        matrix = tensors[name]
        if not matrix.is_floating_point():
            raise Quantized(f"its weights are stored as {matrix.dtype}")
        return [float(x) for x in matrix.detach()[list(rows), list(columns)].float().cpu()]

    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _take(shapes.__getitem__, read, shapes, layers, width, quantized)


def of_checkpoint(folder: Path, layers: Sequence[int], width: int) -> WeightSamples:
    """Samples of the safetensors files of a folder.

    Args:
        layers: indices of the layers in question; the first, the middle and the last are looked at.
        width: KV heads times head_dim of the whole model.

    Raises:
        NotComparable: there are none, or they hold no plain k_proj and v_proj.
    """
    _check_plain(folder)
    places = _places(folder)

    def shape(name: str) -> tuple[int, ...]:
        with safe_open(places[name], "pt") as file:
            return tuple(file.get_slice(name).get_shape())

    def read(name: str, rows: Sequence[int], columns: Sequence[int]) -> list[float]:
        with safe_open(places[name], "pt") as file:
            matrix = file.get_slice(name)
            if matrix.get_dtype() not in _PLAIN:
                raise Quantized(f"its weights are stored as {matrix.get_dtype()}")
            return [
                float(matrix[row : row + 1, column : column + 1])
                for row, column in zip(rows, columns, strict=True)
            ]

    try:
        return _take(shape, read, places, layers, width)
    except (SafetensorError, OSError) as error:
        raise NotComparable(f"its files cannot be read ({error})") from error


def _check_plain(folder: Path) -> None:
    try:
        config = json.loads((folder / "config.json").read_text())
        quantization = config.get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return  # whoever loads the model says so better
    if quantization:
        raise Quantized(f"it is quantized ({quantization.get('quant_method', 'as it says')})")


def _places(folder: Path) -> Mapping[str, Path]:
    """Names of the projections to the files that hold them."""
    index = folder / _INDEX
    try:
        if index.is_file():
            names = json.loads(index.read_text())["weight_map"]
            found = {name: folder / file for name, file in names.items()}
        else:
            found = {}
            for path in sorted(folder.glob("*.safetensors")):
                with safe_open(path, "pt") as file:
                    found.update(dict.fromkeys(file.keys(), path))
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise NotComparable(f"its files cannot be read ({error})") from error
    if not found:
        raise NotComparable("it has no safetensors files")
    return {name: path for name, path in found.items() if _PROJECTION.search(name)}


def _take(
    shape: Callable[[str], tuple[int, ...]],
    read: Callable[[str, Sequence[int], Sequence[int]], list[float]],
    names: Iterable[str],
    layers: Sequence[int],
    width: int,
    quantized: str = "",
) -> WeightSamples:
    by_layer: dict[int, dict[str, str]] = {}
    for name in names:
        match = _PROJECTION.search(name)
        if match and not _OTHER_TOWERS.search(name[: match.start()]):
            by_layer.setdefault(int(match[1]), {})[match[2]] = name
    samples = {}
    for layer in sorted({layers[0], layers[len(layers) // 2], layers[-1]}):
        projections = by_layer.get(layer, {})
        samples[layer] = {
            which: _sample(shape, read, projections, which, width) for which in ("k", "v")
        }
    return WeightSamples.model_validate({"quantized": quantized, "layers": samples})


def _sample(
    shape: Callable[[str], tuple[int, ...]],
    read: Callable[[str, Sequence[int], Sequence[int]], list[float]],
    projections: Mapping[str, str],
    which: str,
    width: int,
) -> list[float]:
    """Of one layer's K or V projection, (width, hidden) or the part of Q, K and V in a stack."""
    name = projections.get(f"{which}_proj") or projections.get("qkv_proj")
    if name is None:
        raise NotComparable("it has no plain k_proj and v_proj")
    size = shape(name)
    own = name == projections.get(f"{which}_proj")
    if len(size) != 2 or (size[0] != width if own else size[0] <= 2 * width):
        raise NotComparable(f"its {name.rsplit('.', 2)[-2]} is {size}, not {width} rows")
    first = 0 if own else size[0] - (2 if which == "k" else 1) * width
    rows = [first + i * width // SAMPLES for i in range(SAMPLES)]
    columns = [i * 7919 % size[1] for i in range(SAMPLES)]  # a prime: all over the columns
    return read(name, rows, columns)
