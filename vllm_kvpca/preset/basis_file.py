"""basis.safetensors of a preset: what its header says is checked before any tensor is read."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from vllm_kvpca.codec.basis import ORTHONORMAL_TOLERANCE, condition, orthonormality_error
from vllm_kvpca.errors import PresetInvalid
from vllm_kvpca.preset.find import BASIS_FILE, CONFIG_FILE, MAX_BYTES, file_of
from vllm_kvpca.preset.schema import PresetConfig

K_BIAS, K_FREQUENCIES = "k_bias", "k_frequencies"
"""Of codec.key_bias, where K is stored without its bias."""
MAX_HEADER_BYTES = 1 << 16
"""Two tensors take 200 bytes of header, and a file may carry some metadata."""
MAX_CONDITION = 1e4
"""Of bases that are not orthonormal: beyond this the float16 of a file is not exact enough."""
_DTYPES = ("F16", "F32")
_AXES = ("layers", "num_kv_heads", "head_dim", "head_dim")
_AGAIN = "Download it again or calibrate it anew."


def load_bases(name: str, folder: Path, config: PresetConfig) -> dict[str, torch.Tensor]:
    """The bases of a calibrated preset.

    The file's size, the length of its header, then names, dtypes and shapes are compared with what
    `config` declares before a tensor is read (safetensors itself sees to it that the tensors of
    the header are the whole of the file). Memory is bounded by the file's float32 form and float64
    copies of one layer.

    Args:
        name: the preset, for messages.

    Returns:
        "k" and "v", where calibrated, to (layers, kv_heads, head_dim, head_dim) float32; and where
        K is stored without its bias "k_bias" to (layers, kv_heads, head_dim) and "k_frequencies"
        to (head_dim / 2,) float32.

    Raises:
        PresetInvalid: the file is missing, damaged or too large, or holds something else than
            finite bases of the declared shape, orthonormal or invertible as the format demands.
    """
    wanted = _declared_shapes(config)
    size = sum(2 * math.prod(shape) for shape in wanted.values())
    if size > MAX_BYTES[BASIS_FILE]:
        raise PresetInvalid(
            f"the bases that {CONFIG_FILE} of preset {name!r} declares, {size:,} bytes, are larger "
            f"than {MAX_BYTES[BASIS_FILE]} bytes: not a preset."
        )
    path = file_of(folder, BASIS_FILE)
    if path is None:
        where = folder / BASIS_FILE
        raise PresetInvalid(f"preset {name!r} needs {where}, which is missing. {_AGAIN}")
    try:
        _check_header_length(path)
        with safe_open(path, "pt") as file:
            _check_header(path, file, wanted)
            tensors = {name: file.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise PresetInvalid(f"{path} cannot be read ({error}): truncated? {_AGAIN}") from error
    for which in "kv":
        for layer in tensors.get(f"{which}_basis", ()):
            _check_layer(path, which, layer, getattr(config, which).basis)
    for name in (K_BIAS, K_FREQUENCIES):
        if name in tensors and not torch.isfinite(tensors[name]).all():
            raise PresetInvalid(f"{path}: {name} holds NaN or infinity. {_AGAIN}")
    return {name.removesuffix("_basis"): tensor.float() for name, tensor in tensors.items()}


def _declared_shapes(config: PresetConfig) -> dict[str, tuple[int, ...]]:
    """Name to shape of each tensor that the file must hold."""
    model = config.model
    assert model is not None  # the schema demands it for calibrated formats
    heads = (len(config.covered), model.num_kv_heads, model.head_dim)
    shapes: dict[str, tuple[int, ...]] = {
        f"{which}_basis": (*heads, model.head_dim)
        for which in "kv"
        if getattr(config, which).calibrated
    }
    if config.k.without_bias:
        shapes |= {K_BIAS: heads, K_FREQUENCIES: (model.head_dim // 2,)}
    return shapes


def _check_header_length(path: Path) -> None:
    """A safetensors file begins with the length of its header, 8 bytes, little-endian."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER_BYTES:
        raise PresetInvalid(
            f"{path} cannot be read: its header is said to be {length:,} bytes long, and that of "
            f"a preset has at most {MAX_HEADER_BYTES:,}. Truncated, or no basis file? {_AGAIN}"
        )


def _check_header(path: Path, file: safe_open, wanted: dict[str, tuple[int, ...]]) -> None:
    if set(file.keys()) != set(wanted):
        found = sorted(file.keys())[:8]
        raise PresetInvalid(f"{path} holds {found}, not the tensors {list(wanted)}. {_AGAIN}")
    for name, shape in wanted.items():
        tensor = file.get_slice(name)
        dtype, have = tensor.get_dtype(), tuple(tensor.get_shape())
        if dtype not in _DTYPES:
            raise PresetInvalid(f"{path}: {name} is {dtype}, not F16 or F32. {_AGAIN}")
        if have != shape:
            raise PresetInvalid(
                f"{path} is of another shape than {CONFIG_FILE} says: {name} has "
                f"{_differing(have, shape)}. {_AGAIN}"
            )


def _differing(have: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """The numbers of a basis that are not those declared, e.g. "head_dim 64, not 128"."""
    if len(have) != len(shape) or len(shape) < 3:
        return f"dimensions {have}, not {shape}"
    pairs = zip(_AXES, have, shape, strict=False)  # a bias has no fourth
    return ", ".join(dict.fromkeys(f"{axis} {a}, not {b}" for axis, a, b in pairs if a != b))


def _check_layer(path: Path, which: str, basis: torch.Tensor, kind: str) -> None:
    """One layer's (kv_heads, head_dim, head_dim): finite, and as `kind` demands."""
    if not torch.isfinite(basis).all():
        raise PresetInvalid(f"{path}: {which}_basis holds NaN or infinity. {_AGAIN}")
    if kind == "balanced":
        worst = condition(basis)
        if not worst < MAX_CONDITION:
            raise PresetInvalid(
                f"{path}: {which}_basis cannot be inverted (condition number {worst:.3g}). {_AGAIN}"
            )
        return
    error = orthonormality_error(basis)
    if error > ORTHONORMAL_TOLERANCE:
        raise PresetInvalid(
            f"{path}: {which}_basis is not orthonormal (|B^T B - I| up to {error:.3g}). {_AGAIN}"
        )
